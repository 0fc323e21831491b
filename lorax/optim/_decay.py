"""Weight decay for adapters, applied to the factors and nothing else by accident.

    u <- u + weight_decay * w      for the roles a, b, p, lam and q

Decaying both factors shrinks their product: (|a|^2 + |b|^2) / 2 is at least the nuclear
norm of a @ b, and equals it when the two are balanced, so the decay pulls a kernel
towards its pretrained value. AdaLoRA's lam is part of the product: while a penalty
keeps p and q orthonormal, |p diag(lam) q| = |lam|, and only lam can bring the kernel
back. A DoRA magnitude or a `Full` leaf would be pulled to zero, away from the
pretrained value. With `full=True`, a Full leaf is pulled towards its initial value,

    u <- u + weight_decay * (value - base leaf)

References:
  Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax import _checks, tree
from lorax.optim import _states, _trees
from lorax.types import Adapters, PyTree


def role_mask(adapters: Adapters, roles: tuple[str, ...] | None) -> Adapters:
    """Returns True for the leaves that decay, in the structure of the adapters.

    Args:
      adapters: `{path: Adapter}`.
      roles: the roles that decay; None for the fields that declare `decays`.
    """
    given = _trees.require_adapters(adapters, "decay_mask")
    return _trees.map_present(lambda _, a: _marked(a, roles), given)


def decay_mask(adapters: Adapters) -> Adapters:
    """Returns True for the fields whose decay to zero removes the update.

    These are the factors (a, b, p, lam, q), but not a magnitude or a Full leaf. Pass it
    as `mask=` to an optax optimiser over adapters.

    Args:
      adapters: `{path: Adapter}`, of arrays or their abstract forms.

    Returns:
      Booleans in the structure of the adapters.

    Example:
      >>> from lorax.adapters import Full
      >>> mask = decay_mask({"bias": Full(jnp.ones(3))})
      >>> mask["bias"].value
      False
      >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=decay_mask)
    """
    return role_mask(adapters, None)


def add_decayed_weights(
    weight_decay: _checks.NumberOrSchedule = 0.0,
    full: bool = False,
    roles: tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds `weight_decay * w` to the updates of the factors.

    Chain it after the moments and before the learning rate.

    Args:
      weight_decay: strength, at least 0; a number or a schedule.
      full: True makes Full leaves decay to the base's values. `update` then needs
        `base=params`, the tree that `lorax.init` returned (`make_train_step` passes
        it).
      roles: roles of the leaves that decay, for optimisers that freeze a factor; None
        for all fields that declare `decays`.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: a negative strength; at `update`, no adapters, or no `base`.

    Example:
      >>> from lorax.adapters import Full
      >>> adapters = {"bias": Full(jnp.ones(1))}
      >>> tx = add_decayed_weights(0.5, full=True)
      >>> zero = jax.tree.map(jnp.zeros_like, adapters)
      >>> base = {"bias": jnp.array([3.0])}
      >>> tx.update(zero, tx.init(adapters), adapters, base=base)[0]["bias"].value
      Array([-1.], dtype=float32)
    """
    _checks.at_least("weight_decay", weight_decay, schedule=True)
    decay = optax.add_decayed_weights(weight_decay)

    def init_fn(params: Adapters) -> optax.OptState:
        return decay.init(_trees.require_adapters(params, "add_decayed_weights"))

    def update_fn(
        updates: Adapters,
        state: optax.OptState,
        params: Adapters | None = None,
        *,
        base: PyTree = None,
        **extra: Any,
    ) -> tuple[Adapters, optax.OptState]:
        del extra
        given = _trees.require_params(params)
        leaves = _base_leaves(base, given) if full else {}

        def away(path: str, adapter: Any) -> Any:
            return _away(adapter, roles, leaves.get(path))

        return decay.update(updates, state, _trees.map_present(away, given))

    return _states.transformation(init_fn, update_fn)


def _marked(adapter: Any, roles: tuple[str, ...] | None) -> Any:
    return adapter.replace(
        **{name: _decays(adapter, name, roles) for name in adapter.roles}
    )


def _decays(adapter: Any, name: str, roles: tuple[str, ...] | None) -> bool:
    field = adapter.fields[name]
    return field.decays if roles is None else field.role in roles


def _away(adapter: Any, roles: tuple[str, ...] | None, leaf: jax.Array | None) -> Any:
    """Each field minus the value it decays to; zero for fields that do not decay."""
    if leaf is not None:
        return adapter.replace(value=adapter.value - leaf.astype(adapter.value.dtype))
    still = {
        name: jax.tree.map(jnp.zeros_like, getattr(adapter, name))
        for name in adapter.roles
        if not _decays(adapter, name, roles)
    }
    return adapter.replace(**still)


def _base_leaves(base: PyTree, adapters: Adapters) -> dict[str, jax.Array]:
    """The leaves of the base under Full adapters."""
    paths = [p for p, a in adapters.items() if _trees.is_present(a) and a.replaces]
    if base is None:
        raise ValueError(
            "add_decayed_weights(full=True) decays Full leaves to the base's values "
            "and needs the base: call tx.update(grads, state, adapters, base=params)"
        )
    leaves = tree.flatten(base)
    tree.require(paths, leaves, "base")
    return {path: leaves[path] for path in paths}
