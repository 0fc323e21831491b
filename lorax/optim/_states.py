"""Builds transformations, and finds their states inside the state of a chain."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import optax

from lorax import _explicit

State = TypeVar("State")


def transformation(
    init_fn: optax.TransformInitFn, update_fn: optax.TransformUpdateExtraArgsFn
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that leaves its inner shardings to the compiler.

    On an Explicit mesh, updates and state come out sharded as they came in.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def call(updates: Any, state: Any, params: Any, extra: Any) -> Any:
            return update_fn(updates, state, params, **extra)

        args = (updates, state, params, extra)
        return _explicit.automatic(call, args, (updates, state))

    return optax.GradientTransformationExtraArgs(init_fn, update)


def states(opt_state: Any, kind: type[State]) -> list[State]:
    """Returns every state of this kind, however deeply chains and wrappers nest it."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def find(opt_state: optax.OptState, kind: type[State], made_by: str) -> State:
    """Returns the only state of this kind.

    Args:
      opt_state: the state of any optax transformation, such as `TrainState.opt_state`.
      kind: the NamedTuple to look for.
      made_by: the transformation that keeps it, for the message.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = states(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"this needs one {kind.__name__}, which {made_by} keeps, but the optimiser "
            f"state holds {len(found)}; pass the state that the optimiser's update "
            "returned"
        )
    return found[0]
