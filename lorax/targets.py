"""Which leaves are adapted, and how: one selection language.

A list of targets is read like a rule table: each pattern is a regular expression that
must match the whole path, and the first target that matches a leaf has it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from lorax import tree
from lorax.kernels import Kernel
from lorax.types import Axes, PyTree

ALL_LINEAR = "all-linear"
ADAPTERS = ("lora", "dora", "adalora", "full")
SCALINGS = {
    "standard": lambda alpha, rank: alpha / rank,
    "rank_stabilized": lambda alpha, rank: alpha / math.sqrt(rank),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A rule: leaves whose path matches get this adapter.

    Args:
      pattern: regular expression, full match on paths such as `block/attn/q/kernel`;
        or "all-linear": every leaf that a dot, conv or ragged_dot consumes, except
        embeddings and output heads, as PEFT means it.
      rank: of the update, from 1 to min(in, out). 8 as in the LoRA paper's GLUE runs.
      alpha: numerator of the scale. 16 as in the same runs.
      adapter: "lora", "dora" or "adalora"; or "full" to train the leaf itself (heads,
        norms, biases).
      init: name of the initialisation of the factors, one of `lorax.inits.INITS`.
      scaling: "standard", alpha / rank; or "rank_stabilized", alpha / sqrt(rank).
      dropout: rate on the adapter branch's input, used when a `lora_key` is given.
      dtype: of the factors; float32 whatever the base's dtype.
      exclude: regular expression of paths to leave out, or several.
      layers: of a stacked kernel, the layers that get factors; None for all.
      slices: of a fused kernel whose first out axis numbers its parts, such as GPT-2's
        `[in, 3, heads, head_dim]`, the parts that get a pair each: (0, 2) for q and v.
        None: one pair for the whole. With adapter="lora" and init="standard".
      options: hyperparameters of the init and of the adapter, as pairs `(name, value)`
        or a dict; the docstring of each init lists its own, and "dora" takes
        `detach_norm` (True).

    Raises:
      ValueError: a value out of range, or a pattern that is no regular expression.

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
    adapter: Literal["lora", "dora", "adalora", "full"] = "lora"
    init: str = "standard"
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    exclude: str | Sequence[str] | None = None
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    slices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        for pattern in [self.pattern, *self.excluded]:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"{pattern!r} is no regular expression: {error}"
                ) from None
        _one_of("adapter", self.adapter, ADAPTERS)
        _one_of("scaling", self.scaling, tuple(SCALINGS))
        if not _whole(self.rank) or self.rank < 1:
            raise ValueError(
                f"{self.pattern!r}: rank={self.rank}; give a whole number >= 1"
            )
        if not _real(self.alpha) or not 0 < self.alpha < math.inf:
            raise ValueError(f"{self.pattern!r}: alpha={self.alpha}; give a number > 0")
        if not _real(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"{self.pattern!r}: dropout={self.dropout}; give a rate in [0, 1)"
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                f"{self.pattern!r}: dtype={self.dtype}; give a floating dtype"
            )
        for field in ("layers", "slices"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, self._rising(field))
        if self.slices is not None and (self.adapter, self.init) != (
            "lora",
            "standard",
        ):
            raise ValueError(
                f"{self.pattern!r}: slices={self.slices} go with adapter='lora' and "
                f"init='standard', not {self.adapter!r} and {self.init!r}"
            )
        try:
            options = tuple(sorted(dict(self.options).items()))
        except (TypeError, ValueError):
            raise ValueError(
                f"{self.pattern!r}: options={self.options!r}; give pairs (name, value)"
            ) from None
        object.__setattr__(self, "options", options)

    def _rising(self, field: str) -> tuple[int, ...]:
        numbers = tuple(getattr(self, field))
        rising = all(map(_whole, numbers)) and sorted(set(numbers)) == list(numbers)
        if not numbers or not rising or numbers[0] < 0:
            raise ValueError(
                f"{self.pattern!r}: {field}={numbers}; give increasing numbers from 0, "
                "or None for all"
            )
        return numbers

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


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}={value!r}; choose one of {', '.join(choices)}")


Rule = Target | tuple | str


def select(
    params: PyTree,
    targets: Rule | Iterable[Rule],
    kernels: Mapping[str, Kernel] | None = None,
) -> dict[str, tuple[Target, Kernel]]:
    """Resolves targets to leaves.

    Args:
      params: the parameter tree.
      targets: `Target`s, or tuples `(regex, rank, ...)` of their fields in order.
      kernels: from `discover`; without it only two-dimensional leaves can get
        low-rank factors, read as `[in, out]`.

    Returns:
      `{path: (target, kernel)}`, the kernel holding the leaf as its `value`.

    Raises:
      ValueError: a pattern that matches nothing, or a leaf that cannot be adapted.
      KeyError: kernels that were discovered on another tree.
    """
    leaves = tree.flatten(params)
    if kernels is not None:
        tree.require(kernels, leaves, "parameter tree given to init")
    chosen: dict[str, tuple[Target, Kernel]] = {}
    for target in as_targets(targets):
        paths = [path for path in leaves if _matches(target, path, kernels)]
        if not paths:
            raise ValueError(
                f"the target {target.pattern!r} matches no leaf"
                + (" outside its exclude" if target.exclude else "")
                + f"; {tree.nearest(target.pattern, leaves)}"
            )
        for path in paths:
            if path not in chosen:
                chosen[path] = target, _kernel(target, path, leaves, kernels)
    return dict(sorted(chosen.items()))


def as_targets(targets: Rule | Iterable[Rule]) -> list[Target]:
    """Returns a list of `Target` from one rule or several."""
    if isinstance(targets, Mapping):
        raise TypeError(
            "targets is a dict; give a list of lorax.Target, or of tuples of its "
            "fields such as (regex, rank), in which the first match wins"
        )
    given: list[Any] = [targets] if isinstance(targets, Target | str) else [*targets]
    if isinstance(targets, tuple):
        if not all(isinstance(rule, Target | tuple | str) for rule in targets):
            given = [targets]  # one rule, such as (regex, rank)
    rules = []
    for rule in given:
        if isinstance(rule, Target):
            rules.append(rule)
        elif isinstance(rule, str):
            rules.append(Target(rule))
        elif isinstance(rule, tuple):
            rules.append(Target(*rule))
        else:
            raise TypeError(
                f"a target is a lorax.Target or a tuple of its fields, not {rule!r}"
            )
    if not rules:
        raise ValueError("no targets: give at least one, lorax.Target('all-linear')")
    return rules


def _matches(target: Target, path: str, kernels: Mapping[str, Kernel] | None) -> bool:
    if any(tree.match(pattern, path) for pattern in target.excluded):
        return False
    if target.pattern != ALL_LINEAR:
        return tree.match(target.pattern, path)
    if kernels is None:
        raise ValueError(
            "the target 'all-linear' asks how the program uses each leaf: pass "
            "kernels=lorax.discover(loss_fn, params, batch) to lorax.init"
        )
    kernel = kernels.get(path)
    if kernel is None or kernel.op not in ("dot", "conv", "ragged_dot"):
        return False
    return not kernel.head and not kernel.tied


def _kernel(
    target: Target,
    path: str,
    leaves: Mapping[str, Any],
    kernels: Mapping[str, Kernel] | None,
) -> Kernel:
    """Returns the description of one matched leaf, or says why it cannot be adapted."""
    leaf = leaves[path]
    if not tree.is_floating(leaf):
        raise ValueError(
            f"{path}: matched by {target.pattern!r}, but its dtype is "
            f"{getattr(leaf, 'dtype', type(leaf).__name__)} and only floating leaves "
            "can be adapted; narrow the pattern or add it to exclude="
        )
    tree.require_adaptable(path, leaf)
    shape = tuple(leaf.shape)
    if kernels is not None:
        tree.require([path], kernels, "program given to discover")
        found = kernels[path]
        if found.shape != shape:
            raise ValueError(
                f"{path}: the leaf has shape {shape} and discover saw {found.shape}; "
                "run discover on these parameters"
            )
    elif len(shape) == 2:
        found = Kernel(path, shape, leaf.dtype, "dot", Axes((0,), (1,)))
    else:
        found = Kernel(path, shape, leaf.dtype, "unknown", None)
    if target.adapter != "full":
        _check_low_rank(target, found, leaves, kernels)
    return dataclasses.replace(found, value=leaf)


def _check_low_rank(
    target: Target,
    kernel: Kernel,
    leaves: Mapping[str, Any],
    kernels: Mapping[str, Kernel] | None,
) -> None:
    path, shape = kernel.path, kernel.shape
    if kernel.axes is None and kernels is None:
        raise ValueError(
            f"{path}: its shape {shape} does not say which axes are read and which "
            "are written; pass kernels=lorax.discover(loss_fn, params, batch)"
        )
    if kernel.axes is None and kernels is not None:
        linear = [p for p in leaves if p in kernels and kernels[p].axes is not None]
        raise ValueError(
            f"{path}: matched by {target.pattern!r}, but no linear operation uses it "
            f"(op={kernel.op!r}), so low-rank factors have no place; use "
            "adapter='full' or narrow the pattern; "
            + (tree.nearest(path, linear) if linear else "no leaf is used linearly")
        )
    axes = kernel.linear_axes()
    in_, out, _ = (math.prod(size) for size in axes.sizes(shape))
    if target.rank > min(in_, out):
        raise ValueError(
            f"{path}: rank={target.rank} is above min(in, out) = {min(in_, out)} of "
            f"the kernel of shape {shape}; lower the rank or exclude the leaf"
        )
    if target.slices is not None:
        size = shape[axes.out[0]]
        if len(axes.out) < 2 or target.slices[-1] >= size:
            raise ValueError(
                f"{path}: slices={target.slices}, but of the shape {shape} the first "
                f"out axis has size {size} of {len(axes.out)} out axes; slices number "
                "the parts of a fused kernel [*in, parts, *out]"
            )
        if target.rank > out // size:
            raise ValueError(
                f"{path}: rank={target.rank} is above the {out // size} outputs "
                "of a slice; lower the rank"
            )
    if target.layers is not None:
        depth = shape[axes.batch[0]] if axes.batch else None
        if depth is None or target.layers[-1] >= depth:
            raise ValueError(
                f"{path}: layers={target.layers}, but the leaf of shape {shape} "
                + (f"stacks {depth} layers" if depth else "is not a stack of layers")
            )
