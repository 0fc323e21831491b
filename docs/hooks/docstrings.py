"""Adapts our docstrings to griffe: an extension for `mkdocs.yml`.

We write `Example:`, because there is one. griffe only knows `Examples:`, and would
read a doctest under any other title as prose, in which `[x][0]` is a link. Papers are
linked.
"""

import re
from typing import Any

import griffe

TITLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


class Docstrings(griffe.Extension):
    """Turns `Example:` into griffe's title, and arXiv numbers into links."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of one object before it is parsed."""
        if obj.docstring is not None:
            text = TITLE.sub(r"\1Examples:", obj.docstring.value)
            link = r"[arXiv:\1](https://arxiv.org/abs/\1)"
            obj.docstring.value = ARXIV.sub(link, text)
