"""MkDocs hook that shows the notebooks in docs/ as pages, with their stored outputs.

The hook converts each notebook to Markdown, so that the theme, the search and the link checks of
the site apply to its page. It does not run the notebooks. `tools/notebooks.py` stores their
outputs.
"""

import base64
import shutil
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


class NotebookPage(File):
    """A page whose source is a notebook. Links to the .ipynb file open the page."""

    def is_documentation_page(self) -> bool:
        """Return True, because this file is a page and not an asset."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace each notebook with a page, and add the images in its outputs."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = NotebookPage(
            file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls
        )
        page.content_string, images = to_markdown(Path(str(file.abs_src_path)))
        files.remove(file)
        files.append(page)
        for name, content in images.items():
            uri = f"{Path(file.src_uri).parent.as_posix()}/{name}"
            files.append(File.generated(config, uri, content=content))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Copy the notebooks to the site for download."""
    for path in Path(config.docs_dir).rglob("*.ipynb"):
        shutil.copyfile(path, config.site_dir / path.relative_to(config.docs_dir))


def to_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of a notebook, and a dictionary of its images by file name."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            if len(parts) == 1:  # insert a link below the title
                parts.append(f'<a href="{path.name}" download>Download this notebook</a>')
        else:
            parts.append(_fence(cell.source, ".python"))
            for output in cell.outputs:
                parts.append(_output(output, cell.metadata, path.stem, images))
    return "\n\n".join(parts) + "\n", images


def _output(output: Any, metadata: Any, stem: str, images: dict[str, bytes]) -> str:
    """Return the Markdown of an output, and add its image to `images`."""
    if output.output_type == "stream":
        return _fence(output.text.rstrip("\n"), ".text .output")
    data = output.data
    if "image/png" in data:
        name = f"{stem}-{len(images) + 1}.png"
        images[name] = base64.b64decode(data["image/png"])
        return f"![{metadata.get('alt', '')}]({name})"
    if "text/html" in data:
        return f'<div class="output">\n{data["text/html"].strip()}\n</div>'
    return _fence(data["text/plain"], ".text .output")


def _fence(text: str, classes: str) -> str:
    return f"``` {{ {classes} }}\n{text}\n```"
