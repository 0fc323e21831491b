"""The order of transformations in a chain, read off its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

MOMENTS = {"mu", "nu", "trace", "ema", "momentum", "sum_of_squares"}
"""Fields in which optax's transforms, and ours, keep moments of gradients."""


def require_order(opt_state: optax.OptState) -> None:
    """Raises ValueError where a transform of gradients comes after their moments.

    A transform cannot see its place in `optax.chain`; the chain's state has it. What
    reads gradients (`reads_gradients` of its state) would get Adam's directions there.
    """

    def seen(state: Any) -> tuple[str, str]:
        """Names the moments and the reader of gradients inside a state, "" for none."""
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
                    f"{own[1]} stands behind the transform of {moments} in the chain: "
                    f"it reads gradients, so write optax.chain({own[1]}(...), ...), "
                    "Adam or momentum behind it"
                )
            moments, reader = moments or own[0], reader or own[1]
        return moments, reader

    seen(opt_state)
