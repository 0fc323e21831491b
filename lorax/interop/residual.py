"""Recovers the initial adapters of an init that changed the base from the two bases.

PiSSA, MiLoRA, LoRA-GA, OLoRA and CorDA leave `W_res = W - s a0 b0` as the frozen base.
The two bases together give `a0 b0`, which is all that a conversion needs:

    initial = residual.initial(adapters, params, residual_params)
    peft.save("plain", adapters, config, initial=initial)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax import tree
from lorax.adapters import pairs
from lorax.types import Adapters, PyTree

NOISE = 0.05  # fraction of the difference that rounding of the bases may leave over


def initial(adapters: Adapters, original: PyTree, residual: PyTree) -> Adapters:
    """Returns factors whose update is `original - residual`, at the adapters' ranks.

    If the bases are in bfloat16, their difference has that rank only up to rounding;
    the best approximation is used.

    Args:
      adapters: `{path: Lora | Dora | AdaLora | Full}`, trained on the residual base.
      original: the base before the init.
      residual: the base after it.

    Returns:
      Adapters like the given ones, with zero factors where the base did not change.

    Raises:
      ValueError: the difference of the bases has a larger rank.
      KeyError: a base lacks a path.
    """
    before, after = tree.flatten(original), tree.flatten(residual)
    tree.require(adapters, before, "original base")
    tree.require(adapters, after, "residual base")
    with jax.ensure_compile_time_eval():  # concrete bases may be closed over by a jit
        return {
            path: adapter
            if adapter.replaces
            else _initial(path, adapter, before[path], after[path])
            for path, adapter in adapters.items()
        }


def _initial(path: str, adapter: Any, before: Any, after: Any) -> Any:
    adapter.check(path, before)
    moved = jnp.asarray(before, jnp.float32) - jnp.asarray(after, jnp.float32)
    held, left = pairs.nearest(adapter, moved)
    whole = jnp.sum(moved**2)
    if left > NOISE**2 * whole:
        raise ValueError(
            f"{path}: the two bases differ by more than an update of rank "
            f"{adapter.rank}: {float(jnp.sqrt(left / whole)):.2g} of the difference "
            "remains; are they the original and its residual?"
        )
    return held
