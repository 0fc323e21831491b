"""The states of transformations inside the state of a chain, found by their kind."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import optax

from lorax import _explicit

State = TypeVar("State")


def transformation(
    init_fn: optax.TransformInitFn, update_fn: optax.TransformUpdateExtraArgsFn
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation; on an Explicit mesh the compiler places its algebra.

    Updates and state then lie as those that came in.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def call(updates: Any, state: Any, params: Any, extra: Any) -> Any:
            return update_fn(updates, state, params, **extra)

        args = (updates, state, params, extra)
        return _explicit.automatic(call, args, (updates, state))

    return optax.GradientTransformationExtraArgs(init_fn, update)


def states(opt_state: Any, kind: type[State]) -> list[State]:
    """Returns every state of this kind, however deep chains and wrappers hold it."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def find(opt_state: optax.OptState, kind: type[State], made_by: str) -> State:
    """Returns the only state of this kind.

    Args:
      opt_state: of any optax transformation, such as `TrainState.opt_state`.
      kind: the NamedTuple to look for.
      made_by: the transformation that has it, for the message.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = states(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"this needs one {kind.__name__}, which {made_by} keeps, and the optimiser "
            f"state holds {len(found)}; pass the state that the optimiser's update "
            "returned"
        )
    return found[0]
