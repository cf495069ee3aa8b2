"""HTML tables and bars that display objects of this package in notebooks."""

import html
from collections.abc import Iterable, Sequence

from resnet56.errors import escape

BAR_COLOR = "#4f8fc4"  # visible on light and dark backgrounds


class Html(str):
    """HTML text, which `table` does not escape."""

    __slots__ = ()


def table(
    rows: Iterable[Sequence[object]], *, columns: Sequence[str] = (), caption: str = ""
) -> str:
    """Return an HTML table. The first column is left-aligned, and all others are right-aligned."""
    lines = [f"<tr>{_cells('th', columns)}</tr>"] if columns else []
    lines += [f"<tr>{_cells('td', row)}</tr>" for row in rows]
    title = f"<div>{_text(caption)}</div>" if caption else ""
    return f"{title}<table>{''.join(lines)}</table>"


def bar(fraction: float) -> Html:
    """Return a horizontal bar whose length is `fraction` of 12 em."""
    style = f"width:{12 * fraction:.2f}em;height:0.8em;border-radius:2px;background:{BAR_COLOR}"
    return Html(f'<div style="width:12em"><div style="{style}"></div></div>')


def _cells(tag: str, values: Sequence[object]) -> str:
    return "".join(
        f'<{tag} style="text-align:{"right" if index else "left"}">{_text(value)}</{tag}>'
        for index, value in enumerate(values)
    )


def _text(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(escape(str(value)))
