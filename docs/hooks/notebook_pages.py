"""Notebooks as pages of the site, with their committed outputs.

A hook of mkdocs. Nothing is run here: a test runs the notebooks.
"""

from __future__ import annotations

import base64
import json
import pathlib
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGES = ("image/svg+xml", "image/png")


def joined(text: str | list[str]) -> str:
    """The text of a field, which a notebook may store line by line."""
    return text if isinstance(text, str) else "".join(text)


def fenced(text: str, language: str) -> str:
    """A fenced block, with more backticks than the text contains."""
    fence = "````" if "```" in text else "```"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def output(cell_output: dict[str, Any]) -> str:
    """Markdown of one output: its image if there is one, else its text."""
    data = cell_output.get("data", {})
    for kind in IMAGES:
        if kind in data:
            image = joined(data[kind])
            if kind == "image/svg+xml":
                image = base64.b64encode(image.encode()).decode()
            return f"![Figure](data:{kind};base64,{image.replace(chr(10), '')})\n"
    return fenced(joined(cell_output.get("text", data.get("text/plain", ""))), "text")


def blocks(notebook: dict[str, Any]) -> Iterator[str]:
    """Markdown of the cells in order."""
    for cell in notebook["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source + "\n"
        elif source.strip():
            yield fenced(source, "python")
            yield from map(output, cell["outputs"])


def notebook_pages() -> dict[str, str]:
    """{page: Markdown} of every notebook."""
    return {
        f"notebooks/{path.stem}.md": "\n".join(blocks(json.loads(path.read_text())))
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    }


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    from mkdocs.structure.files import File

    for page, text in notebook_pages().items():
        files.append(File.generated(config, page, content=text))
    return files
