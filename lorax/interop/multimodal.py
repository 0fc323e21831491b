"""Reads the text model of a multimodal checkpoint, and nothing else of it.

| model_type | the text model's |
|---|---|
| gemma3 | gemma3_text |
| gemma4 | gemma4_text |

Its tensors are named `language_model.model...`, or `model.language_model...` like the
modules of transformers 5. A warning names what is not read, such as a vision tower.
`hf.save` writes a checkpoint with the text model's own `model_type`.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from lorax import untrusted
from lorax.models import hf_config

T = TypeVar("T")

TEXTS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}
"""The text model's `model_type`, by that of the multimodal model."""

INSIDE = "language_model"
"""The text model's name among the modules of the multimodal model."""

PREFIXES = {
    f"{INSIDE}.model.": "model.",
    f"{INSIDE}.lm_head.": "lm_head.",
    f"model.{INSIDE}.": "model.",
}
"""Prefixes of the text model's own names, by those in the multimodal model."""

SHARED = ("tie_word_embeddings", "quantization_config")
"""Fields of the multimodal model's config that also apply to the text model."""

OTHERS = frozenset(
    """
    audio_config audio_token_id boa_token_id boi_token_id boi_token_index
    eoa_token_id eoa_token_index eoi_token_id eoi_token_index image_token_id
    image_token_index mm_tokens_per_image video_token_id vision_config
    vision_soft_tokens_per_image
    """.split()
)
"""Fields for the other modalities."""


def text_config(config: Mapping[str, Any], directory: Any) -> Mapping[str, Any]:
    """Returns the config of the text model; a config that is not multimodal, unchanged.

    Args:
      config: the content of config.json.
      directory: where it is, for errors.

    Raises:
      ValueError: a field is unknown, or two fields disagree.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in TEXTS:
        return config
    fields = hf_config.Fields(config, kind)
    try:
        text = dict(fields.take("text_config", untrusted.TABLE, {}))
        outer = {"model_type": TEXTS[kind]}
        outer |= {name: fields.left.pop(name, None) for name in SHARED}
        fields.finish(*OTHERS)
        for name, value in outer.items():
            if value is not None and text.setdefault(name, value) != value:
                raise ValueError(
                    f"config.json of {kind}: {name} of the text model is "
                    f"{untrusted.shown(value)}, and in text_config "
                    f"{untrusted.shown(text[name])}"
                )
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return text


def text_tensors(tensors: Mapping[str, T], config: Mapping[str, Any]) -> dict[str, T]:
    """Returns the text model's tensors by their names in a checkpoint of its own.

    Warns about the others, which are not read.

    Args:
      tensors: of the checkpoint, by name.
      config: the content of config.json; if it is not multimodal, all are returned.
    """
    kind = config.get("model_type")
    if kind not in TEXTS:
        return dict(tensors)
    text: dict[str, T] = {}
    unread: collections.Counter[str] = collections.Counter()
    for key, tensor in tensors.items():
        front = prefix(key)
        if front or key.startswith("lm_head."):
            text[inner(key, front)] = tensor
        else:
            unread[key.removeprefix("model.").partition(".")[0]] += 1
    told = ", ".join(f"{name} ({count} tensors)" for name, count in unread.items())
    if told:
        warnings.warn(
            f"from this {kind} checkpoint lorax reads only the text model, "
            f"{TEXTS[str(kind)]}; not read: {told}",
            stacklevel=3,
        )
    return text


def prefix(name: str) -> str:
    """Returns which of `PREFIXES` a multimodal model's name begins with, or ""."""
    return next((front for front in PREFIXES if name.startswith(front)), "")


def inner(name: str, front: str) -> str:
    """Returns the text model's own name for one that begins with `front`."""
    return PREFIXES.get(front, "") + name.removeprefix(front)
