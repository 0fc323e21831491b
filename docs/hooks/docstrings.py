"""Adapts our docstrings to griffe: an extension for `mkdocs.yml`.

We write `Example:`, because there is one. griffe only knows `Examples:`, and would
read a doctest under any other title as prose, in which `[x][0]` is a link. Papers are
linked, and a method gets the equation of its page after its first paragraph.
"""

import ast
import functools
import pathlib
import re
import runpy
from typing import Any

import griffe

TITLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
PAGES = pathlib.Path(__file__).with_name("method_pages.py")


class Docstrings(griffe.Extension):
    """Turns `Example:` into griffe's title, and arXiv numbers into links."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of one object before it is parsed."""
        if obj.docstring is not None:
            text = TITLE.sub(r"\1Examples:", obj.docstring.value)
            link = r"[arXiv:\1](https://arxiv.org/abs/\1)"
            text = ARXIV.sub(link, text)
            if equation := equations().get((obj.filepath, obj.name)):
                first, blank, rest = text.partition("\n\n")
                text = f"{first}\n\n$$\n{equation}\n$$\n{blank}{rest}"
            obj.docstring.value = text


@functools.cache
def equations() -> dict[tuple[Any, str], str]:
    """{(file, name): LaTeX} of the methods that have pages; rsLoRA is LoRA's class."""
    pages, found = runpy.run_path(str(PAGES)), {}
    for name, told in pages["methods"]().items():
        file = pages["source"](name, told)
        body = ast.parse(file.read_text(encoding="utf-8")).body
        own = pages["symbol"](name, body, told).rpartition(".")[2]
        found.setdefault((file, own), told["equation"].strip())
    return found
