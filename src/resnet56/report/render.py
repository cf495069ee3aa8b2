"""Render templates as HTML, or as Markdown with separate image files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from resnet56.files import write_bytes, write_text
from resnet56.report import words
from resnet56.report.plots import Chart, shortened

TEMPLATE_DIR = Path(__file__).parent
MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]|$~])")  # special characters anywhere in a line
UNBREAKABLE = re.compile(r"(\d[\d.,]* %|\d+(?: \N{MULTIPLICATION SIGN} \d+)+)")


def escape_markdown(text: str) -> str:
    """Convert plain text to one line of Markdown that is rendered literally."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = MARKDOWN_SPECIAL.sub(r"\\\1", text)
    return re.sub(r"^([#+=-])", r"\\\1", text)


def unbroken(text: str) -> Markup:
    """Convert plain text to HTML without line breaks inside percentages and image sizes."""
    parts = re.split(UNBREAKABLE, text)
    marked = (
        Markup('<span class="nb">{}</span>').format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )
    return Markup("").join(marked)


def write_html(out: Path, template: str, content: dict[str, Any], style: str = "page") -> None:
    """Render a template as HTML with a style sheet. Raises RunError if writing the file fails."""
    environment = _environment(autoescape=True)
    environment.filters["unbroken"] = unbroken
    environment.filters["shortened"] = shortened
    environment.filters["svg"] = lambda chart: Markup(chart.svg())
    sheets = (TEMPLATE_DIR / f"{name}.css" for name in ("base", style))
    css = Markup("".join(sheet.read_text(encoding="utf-8") for sheet in sheets))
    text = environment.get_template(f"{template}.html.j2").render(content, css=css)
    write_text(out, re.sub(r"\n\s*\n+", "\n", text))


def write_markdown(out: Path, template: str, content: dict[str, Any]) -> None:
    """Render a template to a Markdown file and image files. Raises RunError if writing fails."""
    directory = out.with_name(f"{out.stem}-files")
    files: dict[str, bytes] = {}

    def save_image(name: str, png: bytes) -> Markup:
        files[f"{name}.png"] = png
        return Markup(quote(f"{directory.name}/{name}.png"))

    environment = _environment(autoescape=False)
    environment.finalize = _finalize
    environment.filters["chart"] = lambda chart: _chart(chart, save_image)
    environment.filters["image"] = lambda image: save_image(image.name, image.png)
    text = environment.get_template(f"{template}.md.j2").render(content)
    for name, png in files.items():
        write_bytes(directory / name, png)
    write_text(out, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def _chart(chart: Chart, save_image: Callable[[str, bytes], Markup]) -> Markup:
    alt = escape_markdown(f"{chart.title}. {chart.alt}")
    return Markup(f"![{alt}]({save_image(chart.name, chart.png())})")


def _finalize(value: Any) -> Any:
    """Escape every string that a template inserts, except Markdown."""
    if isinstance(value, Markup):
        return str(value)
    return escape_markdown(value) if isinstance(value, str) else value


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in words.__all__:
        environment.filters[name] = getattr(words, name)
    return environment
