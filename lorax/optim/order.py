"""Checks the order of transformations in a chain from its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

MOMENTS = {"mu", "nu", "trace", "ema", "momentum", "sum_of_squares"}
"""State fields in which optax's transforms, and ours, keep moments of gradients."""


def require_order(opt_state: optax.OptState) -> None:
    """Raises ValueError if a transform of gradients comes after their moments.

    A transform cannot see its place in `optax.chain`, but the chain's state shows it.
    After Adam, a transform that expects gradients (its state has `reads_gradients`)
    would get Adam's directions instead.
    """

    def seen(state: Any) -> tuple[str, str]:
        """Returns the names of the moments and of the gradient reader, "" for none."""
        reader = getattr(state, "reads_gradients", "")
        keeps = MOMENTS.intersection(getattr(state, "_fields", ()))
        if reader or keeps:
            return type(state).__name__ if keeps else "", reader
        if isinstance(state, Mapping):
            inside = [*state.values()]
        else:
            inside = [*state] if isinstance(state, tuple) else []
        moments = reader = ""
        for own in map(seen, inside):
            if type(state) is tuple and moments and own[1]:  # a chain: in this order
                raise ValueError(
                    f"{own[1]} comes after the transform of {moments} in the chain, "
                    f"but it reads gradients: write optax.chain({own[1]}(...), ...), "
                    "with Adam or momentum after it"
                )
            moments, reader = moments or own[0], reader or own[1]
        return moments, reader

    seen(opt_state)
