"""What `config.model.quantize` means: a base in a few bits per weight."""

from typing import Any

import jax

import lorax
from lorax.interop import hf
from lorax.quantized import FORMATS, is_quantized

OF_FILE = "file"
"""Keeps the codes of a GGUF file as they are."""


def rules(text: str) -> list[tuple[str, str | None]]:
    """Returns the rules for `lorax.quantize` that a text stands for.

    Args:
      text: a format for the kernels that "all-linear" matches, such as "nf4"; or pairs,
        of which the first match wins, such as ".*down.*=int8,all-linear=nf4". The
        format "none" leaves kernels as they are. "" and "file" have no rules.

    Raises:
      ValueError: a format that `lorax.quantize` does not know.
    """
    if text in ("", OF_FILE):
        return []
    found: list[tuple[str, str | None]] = []
    for rule in text.split(","):
        pattern, _, form = rule.strip().rpartition("=")
        if form not in (*FORMATS, "none"):
            raise ValueError(
                f"{text!r}: the format {form!r} is not one of {', '.join(FORMATS)}; "
                "give one, or pattern=format,pattern=format, or 'file' for the codes "
                "of a GGUF file"
            )
        found.append((pattern or "all-linear", None if form == "none" else form))
    return found


def quantized(model: Any, params: Any, text: str) -> Any:
    """Returns the parameters of a model of `lorax.models`, quantised as `text` says."""
    if not (given := rules(text)):
        return params

    def call(params: Any, *tokens: jax.Array) -> Any:
        return model.apply({"params": params}, *tokens)

    kernels = lorax.discover(call, params, *hf.example(model))
    return lorax.quantize(params, given, kernels)


def packed(params: Any) -> bool:
    """Whether some of the parameters are quantised."""
    return any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))
