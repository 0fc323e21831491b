"""A rule of the selection language: which leaves get an adapter, and which one."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from lorax import _checks, adapters, untrusted

ALL_LINEAR = "all-linear"
SCALINGS = {
    "standard": lambda alpha, rank: alpha / rank,
    "rank_stabilized": lambda alpha, rank: alpha / math.sqrt(rank),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A rule: leaves whose path matches get this adapter.

    Args:
      pattern: regular expression that must match the whole path, such as
        `block/attn/q/kernel`; or "all-linear": every leaf used by a dot, conv or
        ragged_dot, except (as in PEFT) embeddings and output heads, and except
        depthwise convolutions and the model's own low-rank factors; `lorax.describe`
        shows what is left out.
      rank: rank of the update, from 1 to min(in, out). 8 as in the LoRA paper's GLUE
        runs.
      alpha: numerator of the scale. 16 as in the same runs.
      adapter: a name in `lorax.adapters.REGISTRY` ("lora", "dora", "adalora", ...), or
        the class itself; "full" trains the leaf itself (heads, norms, biases).
      init: a name in `lorax.inits.REGISTRY`, or a function `(key, kernel, target,
        stats) -> (adapter, kernel)`; "standard" is the class's own.
      scaling: "standard", alpha / rank; or "rank_stabilized", alpha / sqrt(rank).
      dropout: rate on the adapter branch's input, used when a `lora_key` is given.
      dtype: dtype of the factors; float32 by default, whatever the base's dtype.
      exclude: one or several regular expressions for paths to leave out.
      layers: for a stacked kernel, the layers that get factors; None for all.
      slices: for a fused kernel whose first out axis numbers its parts, such as GPT-2's
        `[in, 3, heads, head_dim]`, the parts that each get a pair: (0, 2) for q and v.
        None: one pair for the whole. Needs adapter="lora" and init="standard".
      options: hyperparameters of the init and the adapter, as pairs `(name, value)`
        or a dict; the docstring of each init lists its own, and "dora" takes
        `detach_norm` (True).
      batch_axes: axes of the leaf along which independent kernels are stacked, besides
        those that `discover` found; negative numbers count from the end. An einsum
        such as `td,edf->tef` does not tell whether e numbers experts or is another
        output axis: (0,) gives each expert its own pair, () confirms the axes that
        `discover` found. None does the same, with a `TargetWarning` where a sibling
        disagrees.
      rows: for an embedding or an untied output head, the numbers of the tokens to
        train, in increasing order, such as those added to a vocabulary:
        `range(32000, 32016)`. Needs adapter="rows", which ignores rank, alpha and
        scaling.

    Raises:
      ValueError: a value out of range, or a pattern that is not a regular expression.

    Example:
      >>> Target(".*/kernel", rank=4, alpha=8).scale
      2.0
      >>> Target(".*/kernel", rank=4, alpha=8, scaling="rank_stabilized").scale
      4.0

    References:
      Hu et al., LoRA, arXiv:2106.09685. Kalajdzievski, A Rank Stabilization Scaling
      Factor for Fine-Tuning with LoRA, arXiv:2312.03732.
    """

    pattern: str
    rank: int = 8
    alpha: float = 16.0
    adapter: str | type[adapters.Parametrisation] = "lora"
    init: str | Callable[..., Any] = "standard"
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    exclude: str | Sequence[str] | None = None
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    slices: tuple[int, ...] | None = None
    batch_axes: tuple[int, ...] | None = None
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        for pattern in [self.pattern, *self.excluded]:
            _require_pattern(pattern)
        cls = adapters.get(self.adapter)
        if not isinstance(self.init, str) and not callable(self.init):
            raise ValueError(
                f"{self.pattern!r}: init={self.init!r}; give a registered name, or a "
                "function (key, kernel, target, stats) -> (adapter, kernel)"
            )
        _checks.one_of("scaling", self.scaling, tuple(SCALINGS))
        self._require_numbers()
        for field in ("layers", "slices", "rows"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, self._rising(field))
        self._require_of_class(cls)
        if self.batch_axes is not None:
            object.__setattr__(self, "batch_axes", self._checked_axes())
        object.__setattr__(self, "options", self._sorted_options())

    def _require_numbers(self) -> None:
        """Checks that rank, alpha, dropout and dtype are valid."""
        if not _checks.is_whole(self.rank) or self.rank < 1:
            raise ValueError(
                f"{self.pattern!r}: rank={self.rank}; give a whole number >= 1"
            )
        if not _checks.is_real(self.alpha) or not 0 < self.alpha < math.inf:
            raise ValueError(f"{self.pattern!r}: alpha={self.alpha}; give a number > 0")
        if not _checks.is_real(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"{self.pattern!r}: dropout={self.dropout}; give a rate in [0, 1)"
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                f"{self.pattern!r}: dtype={self.dtype}; give a floating dtype"
            )

    def _require_of_class(self, cls: type[adapters.Parametrisation]) -> None:
        """Checks the fields that only some adapter classes support."""
        if self.slices is not None and (not cls.sliced or self.init != "standard"):
            raise ValueError(
                f"{self.pattern!r}: slices={self.slices} needs adapter='lora' and "
                f"init='standard', not {self.adapter!r} and {self.init!r}"
            )
        if cls.by_rows != (self.rows is not None):
            raise ValueError(
                f"{self.pattern!r}: rows={self.rows} and adapter={self.adapter!r}; to "
                "train rows of an embedding, give both adapter='rows' and their "
                "numbers, such as rows=range(32000, 32016)"
            )
        if self.dropout and not cls.drops:
            raise ValueError(
                f"{self.pattern!r}: dropout={self.dropout}, but adapter="
                f"{self.adapter!r} has no branch to apply it to; leave dropout out"
            )

    def _sorted_options(self) -> tuple[tuple[str, Any], ...]:
        try:
            return tuple(sorted(dict(self.options).items()))
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.pattern!r}: options={self.options!r}; give pairs (name, value)"
            ) from None

    def _rising(self, field: str) -> tuple[int, ...]:
        numbers = tuple(getattr(self, field))
        whole = all(map(_checks.is_whole, numbers))
        rising = whole and sorted(set(numbers)) == list(numbers)
        if not numbers or not rising or numbers[0] < 0:
            instead = "" if field == "rows" else ", or None for all"
            raise ValueError(
                f"{self.pattern!r}: {field}={untrusted.shown(numbers)}; give "
                f"increasing numbers from 0{instead}"
            )
        return tuple(map(int, numbers))

    def _checked_axes(self) -> tuple[int, ...]:
        given = self.batch_axes
        numbers = tuple(given) if isinstance(given, tuple | list) else None
        if (
            numbers is None
            or not all(map(_checks.is_whole, numbers))
            or len(set(numbers)) < len(numbers)
        ):
            raise ValueError(
                f"{self.pattern!r}: batch_axes={given!r}; give a tuple of distinct "
                "axes of the leaf, such as (0,), or None for what discover found"
            )
        if adapters.get(self.adapter).replaces and numbers:
            raise ValueError(
                f"{self.pattern!r}: batch_axes={numbers} applies to low-rank factors, "
                f"and adapter={self.adapter!r} has none; leave batch_axes out"
            )
        return tuple(map(int, numbers))

    @property
    def scale(self) -> float:
        """The factor on `a @ b`."""
        return float(SCALINGS[self.scaling](self.alpha, self.rank))

    @property
    def excluded(self) -> tuple[str, ...]:
        """The exclude patterns, as a tuple."""
        if self.exclude is None:
            return ()
        return (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)


def _require_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


Rule = Target | tuple | str
