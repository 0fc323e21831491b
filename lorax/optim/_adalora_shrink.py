"""After AdaLoRA: effective ranks, budget, and adapters without pruned triplets.

    lorax.optim.adalora_effective_ranks(opt_state)       # {path: int32 [*batch]}
    small = lorax.optim.adalora_shrink(adapters, opt_state)

During training, pruned triplets are masked but never removed, so that shapes are static
and a triplet can come back. Pruned only means lam = 0: lam still gets a gradient, so
any optimiser other than `adalora` moves it off zero at its first step, and the budget
is lost. To train on, use the shrunk adapters, which contain only the kept triplets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax.adapters import AdaLora
from lorax.optim import _states, _trees
from lorax.optim._adalora import AdaLoraState
from lorax.types import Adapters


def adalora_effective_ranks(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Returns how many triplets of every matrix the last choice kept.

    Args:
      opt_state: state of `adalora`, or of a transformation that contains it.

    Returns:
      `{path: int32 [*batch]}`; they sum to the budget at the last choice.

    Raises:
      ValueError: no `adalora` state, or several.
    """
    masks = _state(opt_state).mask
    return {path: masks[path].sum(-1, dtype=jnp.int32) for path in sorted(masks)}


def adalora_budget(opt_state: optax.OptState) -> jax.Array:
    """Returns b(t), the total rank the schedule allowed at the last update, int32 [].

    Args:
      opt_state: state of `adalora`, or of a transformation that contains it.

    Returns:
      The schedule's value; the masks follow the value at the last choice, at most
      `interval` updates ago.

    Raises:
      ValueError: no `adalora` state, or several.
    """
    return _state(opt_state).budget


def adalora_shrink(
    adapters: Adapters, opt_state: optax.OptState | None = None
) -> Adapters:
    """Returns the same update in smaller adapters, without the pruned triplets.

    A stack has a single physical rank, the largest among its layers; the other layers
    are padded with zeros, whose gradients are zero, too. A leaf with no triplets left
    is dropped, since its kernel is the frozen one. `scale` stays alpha over the initial
    rank. Do not call this under jit: the shapes depend on the values.

    Args:
      adapters: the trained adapters; those other than AdaLora are returned unchanged.
      opt_state: the matching optimiser state; None if only the adapters were saved, in
        which case triplets whose lam is exactly zero count as pruned.

    Returns:
      An adapter tree.

    Raises:
      ValueError: a pruned triplet whose lam is not zero, as happens between two
        choices; no `adalora` state, or several; without a state, no AdaLora adapter.

    Example:
      >>> from lorax.optim import adalora
      >>> from lorax.types import Axes
      >>> lora = AdaLora(jnp.eye(3, 2), jnp.ones(2), jnp.eye(2), 1.0, Axes((0,), (1,)))
      >>> tx = adalora(
      ...     optax.sgd(0.5), target_budget=1, total_steps=2, initial_warmup=0,
      ...     final_steps=1, orthogonal_weight=0.0)
      >>> slope = jax.tree.map(jnp.zeros_like, lora).replace(lam=jnp.array([0.1, 0.4]))
      >>> updates, state = tx.update({"w": slope}, tx.init({"w": lora}), {"w": lora})
      >>> adapters = optax.apply_updates({"w": lora}, updates)
      >>> adalora_shrink(adapters, state)["w"].lam
      Array([0.8], dtype=float32)
    """
    shrunk = dict(adapters)
    for path, mask in _masks(adapters, opt_state).items():
        adapter: Any = adapters[path]
        if np.any(np.asarray(adapter.lam)[~mask]):
            raise ValueError(
                f"{path}: pruned triplets have been trained since the last choice, so "
                "removing them would change the function; shrink after an update that "
                "chooses, or within the last final_steps"
            )
        if mask.any():
            shrunk[path] = _packed(adapter, mask)
        else:
            del shrunk[path]
    return shrunk


def _masks(adapters: Adapters, opt_state: optax.OptState | None) -> dict[str, Any]:
    """False for pruned triplets, `{path: bool [*batch, rank]}`."""
    if opt_state is not None:
        return jax.device_get(_state(opt_state).mask)
    own: dict[str, Any] = dict(adapters)
    found = {
        p: np.asarray(a.lam) != 0 for p, a in own.items() if _trees.has_triplets(a)
    }
    if not found:
        kinds = sorted({type(a).__name__ for a in adapters.values()})
        raise ValueError(
            f"adalora_shrink found no AdaLora adapter among {', '.join(kinds)}: there "
            "is nothing to shrink"
        )
    return found


def _state(opt_state: optax.OptState) -> AdaLoraState:
    return _states.find(opt_state, AdaLoraState, "lorax.optim.adalora")


def _packed(adapter: AdaLora, mask: np.ndarray) -> AdaLora:
    """The kept triplets of every matrix, then zeros, up to the largest rank."""
    rank = int(mask.sum(-1).max())
    order = np.argsort(~mask, axis=-1, kind="stable")[..., :rank]
    real = np.take_along_axis(mask, order, -1)
    batch, old = mask.shape[:-1], mask.shape[-1]

    def kept(flat: jax.Array, axis: int) -> jax.Array:
        """The kept triplets of `[*batch, ..., old, ...]` along an axis."""
        others = [d for d in range(len(batch), flat.ndim) if d != flat.ndim + axis]
        chosen, own = (np.expand_dims(x, others) for x in (order, real))
        return jnp.where(own, jnp.take_along_axis(flat, jnp.asarray(chosen), axis), 0)

    p = kept(adapter.p.reshape(*batch, -1, old), -1)
    q = kept(adapter.q.reshape(*batch, old, -1), -2)
    outs = adapter.q.shape[len(batch) + 1 :]
    return dataclasses.replace(
        adapter,
        p=p.reshape(*adapter.p.shape[:-1], rank),
        lam=kept(adapter.lam, -1),
        q=q.reshape(*batch, rank, *outs),
    )
