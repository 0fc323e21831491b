"""The text model in a multimodal checkpoint, which is all that is read of it.

| model_type | the text model's |
|---|---|
| gemma3 | gemma3_text |
| gemma4 | gemma4_text |

Its tensors are named `language_model.model...`, or `model.language_model...` as modules
are named in transformers 5. What is left unread, such as a vision tower, is named in a
warning. `hf.save` writes a checkpoint of the text model's own `model_type`.
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
"""Name of the text model among the modules of the multimodal one."""

PREFIXES = {
    f"{INSIDE}.model.": "model.",
    f"{INSIDE}.lm_head.": "lm_head.",
    f"model.{INSIDE}.": "model.",
}
"""What the text model's own names begin with, by what they begin with in the whole."""

SHARED = ("tie_word_embeddings", "quantization_config")
"""Fields of the whole that the text model has too."""

OTHERS = frozenset(
    """
    audio_config audio_token_id boa_token_id boi_token_id boi_token_index
    eoa_token_id eoa_token_index eoi_token_id eoi_token_index image_token_id
    image_token_index mm_tokens_per_image video_token_id vision_config
    vision_soft_tokens_per_image
    """.split()
)
"""Fields that speak of the other modalities."""


def text_config(config: Mapping[str, Any], directory: Any) -> Mapping[str, Any]:
    """Returns the config of the text model; one that is not multimodal, as it is.

    Args:
      config: of config.json.
      directory: where it lies, for errors.

    Raises:
      ValueError: a field that nobody here knows, or two that disagree.
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
    """Returns the text model's tensors by the names of its own checkpoint.

    Warns of the others, which are left unread.

    Args:
      tensors: of the checkpoint, by name.
      config: of config.json; one that is not multimodal has all of them.
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
            f"of this {kind} checkpoint lorax reads the text model, "
            f"{TEXTS[str(kind)]}; left unread: {told}",
            stacklevel=3,
        )
    return text


def prefix(name: str) -> str:
    """Returns which of `PREFIXES` a name of the whole begins with, or ""."""
    return next((front for front in PREFIXES if name.startswith(front)), "")


def inner(name: str, front: str) -> str:
    """Returns the text model's own name for one that begins with `front`."""
    return PREFIXES.get(front, "") + name.removeprefix(front)
