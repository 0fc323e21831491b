"""Our docstrings as griffe reads them: an extension for `mkdocs.yml`.

We write `Example:`, because there is one. griffe knows `Examples:`, and would read a
doctest under the other title as prose, in which `[x][0]` is a link.
"""

import re
from typing import Any

import griffe

TITLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Titles(griffe.Extension):
    """Makes `Example:` the title that griffe knows."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of one object before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = TITLE.sub(r"\1Examples:", obj.docstring.value)
