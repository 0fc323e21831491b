"""Equations as MathML, made when the site is built: a hook of mkdocs.

Browsers draw MathML themselves, so no page needs an external script or font.
"""

from __future__ import annotations

import html
import re
from typing import Any

EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL
)


def on_page_content(text: str, page: Any, config: Any, files: Any) -> str:
    """Replaces each equation that `pymdownx.arithmatex` marked in a page."""
    del page, config, files
    from latex2mathml import converter

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return converter.convert(html.unescape(match[2]).strip(), display=display)

    return EQUATION.sub(drawn, text)
