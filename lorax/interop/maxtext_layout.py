"""Where leaves of MaxText's trees go here, and how values differ: see `maxtext`."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax import untrusted
from lorax.interop.peft_base import Base

KERNELS = {
    "self_attention/query/kernel": "q/kernel",
    "self_attention/key/kernel": "k/kernel",
    "self_attention/value/kernel": "v/kernel",
    "self_attention/out/kernel": "o/kernel",
    "mlp/wi_0/kernel": "gate/kernel",
    "mlp/wi_1/kernel": "up/kernel",
    "mlp/wo/kernel": "down/kernel",
}
LLAMA = KERNELS | {
    "pre_self_attention_layer_norm/scale": "norm_attn/scale",
    "post_self_attention_layer_norm/scale": "norm_mlp/scale",
}
GEMMA3 = KERNELS | {
    "self_attention/query_norm/scale": "norm_q/scale",
    "self_attention/key_norm/scale": "norm_k/scale",
    "pre_self_attention_norm/scale": "norm_attn/scale",
    "post_self_attention_norm/scale": "norm_attn_out/scale",
    "pre_ffw_norm/scale": "norm_mlp/scale",
    "post_ffw_norm/scale": "norm_mlp_out/scale",
}
LAYERS = {"llama": LLAMA, "mistral": LLAMA, "gemma3_text": GEMMA3}
"""Leaves of a layer, by model_type."""

OUTSIDE = {
    "token_embedder/embedding": "embed/embedding",
    "decoder/decoder_norm/scale": "norm_out/scale",
    "decoder/logits_dense/kernel": "head/kernel",
}
PATTERN = 6
"""Layers in a block of Gemma 3, the last of which has global attention."""


class Place(NamedTuple):
    """Where a leaf of MaxText goes here.

    Attributes:
      name: the leaf's name in its layer.
      layers: the layers that it stacks, or its only layer; None if it is in no layer.
    """

    name: str
    layers: range | int | None

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a layer axis."""
        return isinstance(self.layers, range)

    @property
    def numbers(self) -> list[int | None]:
        """The layers, one by one."""
        return [*self.layers] if isinstance(self.layers, range) else [self.layers]


class Change(NamedTuple):
    """Converts values to MaxText's: `times * x + more`, then pairs made adjacent.

    Attributes:
      times: factor.
      more: summand.
      head: size of the heads whose pairs (i, i + head / 2) become adjacent; 0: none.
    """

    times: float = 1.0
    more: float = 0.0
    head: int = 0

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Returns MaxText's values; the last axis may hold several heads."""
        x = x.astype(np.float32) * np.float32(self.times) + np.float32(self.more)
        return self._turned(x, 2, self.head // 2) if self.head else x

    def undo(self, x: np.ndarray) -> np.ndarray:
        """Returns our values for MaxText's."""
        x = self._turned(x, self.head // 2, 2) if self.head else x
        return (x.astype(np.float32) - np.float32(self.more)) / np.float32(self.times)

    def _turned(self, x: np.ndarray, rows: int, columns: int) -> np.ndarray:
        heads = x.reshape(*x.shape[:-1], -1, rows, columns)
        return heads.swapaxes(-1, -2).reshape(x.shape)


def places(config: Any, scanned: bool) -> dict[str, Place]:
    """Returns the place of every leaf of MaxText."""
    if config.model_type not in LAYERS:
        raise ValueError(
            f"model_type={config.model_type!r}: MaxText's layout is known here only "
            f"for {', '.join(LAYERS)}"
        )
    found = {name: Place(own, None) for name, own in OUTSIDE.items()}
    if config.tied:
        del found["decoder/logits_dense/kernel"]
    for name, layers in _stacks(config, scanned).items():
        for leaf, own in LAYERS[config.model_type].items():
            found[f"{name}/{leaf}"] = Place(own, layers)
    here = {re.sub(r"^layers(_\d+)?/", "", path) for path in Base(config).shapes}
    if odd := sorted(here ^ {place.name for place in found.values()}):
        raise ValueError(
            f"MaxText's {config.model_type!r} and this model differ in "
            f"{untrusted.some(odd)}"
        )
    return found


def _stacks(config: Any, scanned: bool) -> dict[str, range | int]:
    """The layers below each name."""
    depth, gemma = config.layers, config.model_type == "gemma3_text"
    if gemma and any(
        bool(window) == (i % PATTERN == PATTERN - 1)
        for i, window in enumerate(config.windows)
    ):
        raise ValueError(
            f"windows={config.windows}: MaxText's Gemma 3 has five layers with a "
            "window and then one without"
        )
    if not scanned:
        return {f"decoder/layers_{i}": i for i in range(depth)}
    if not gemma:
        return {"decoder/layers": range(depth)}
    whole, blocks = depth - depth % PATTERN, "decoder/layers/layers"
    found: dict[str, range | int] = {
        f"{blocks}_{i}": range(i, whole, PATTERN) for i in range(PATTERN) if whole
    }
    rest = range(whole, depth)
    return found | {
        f"decoder/layers_remainder/layers_{i}": layer for i, layer in enumerate(rest)
    }


def change_of(name: str, config: Any) -> Change:
    """Returns how the values of one of our leaves differ from MaxText's."""
    if config.model_type == "gemma3_text":
        if name == "embed/embedding":
            return Change(times=float(jnp.bfloat16(config.width**0.5)))
        return Change(more=1.0) if name.endswith("/scale") else Change()
    turned = config.rope.kind == "llama3" and name in ("q/kernel", "k/kernel")
    times = config.head_dim**-0.5 if name == "q/kernel" else 1.0
    return Change(times, head=config.head_dim if turned else 0)
