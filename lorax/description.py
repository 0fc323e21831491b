"""What targets do to a model: which leaves they adapt or leave out, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lorax import adapters, selection, tree
from lorax.kernels import Kernel
from lorax.targets import Rule, Target
from lorax.types import PyTree


class Described(NamedTuple):
    """The description of one leaf.

    Attributes:
      path: the leaf's path.
      shape: its shape.
      use: how the program uses it: the operation, and which axes it reads, writes and
        batches.
      target: the pattern of the target that adapts it; None if it is left out.
      adapter: the name of the adapter's class; None if it is left out.
      parameters: how many parameters train in its place; 0 if it is left out.
      reason: why it is left out; for an adapted leaf, where its kernel must be merged.
    """

    path: str
    shape: tuple[int, ...]
    use: str
    target: str | None
    adapter: str | None
    parameters: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Description:
    """The leaves that targets adapt, and the matrices that they leave out.

    Attributes:
      leaves: the described leaves, sorted by path.
    """

    leaves: tuple[Described, ...]

    def __iter__(self) -> Iterator[Described]:
        """Iterates over the leaves."""
        return iter(self.leaves)

    @property
    def adapted(self) -> tuple[Described, ...]:
        """The leaves with an adapter."""
        return tuple(leaf for leaf in self.leaves if leaf.adapter is not None)

    @property
    def left_out(self) -> tuple[Described, ...]:
        """The matrices without an adapter."""
        return tuple(leaf for leaf in self.leaves if leaf.adapter is None)

    @property
    def parameters(self) -> int:
        """How many parameters train."""
        return sum(leaf.parameters for leaf in self.leaves)

    def __str__(self) -> str:
        """The table of all leaves, and a summary line."""
        return self.table()

    def table(self, leaves: Sequence[Described] | None = None) -> str:
        """Returns a table of some leaves (by default all), and a summary of all.

        Args:
          leaves: a subset of the description's leaves, such as `left_out`.
        """
        rows = [("path", "shape", "use", "adapter", "parameters", "target or reason")]
        rows += [
            (
                leaf.path,
                "x".join(map(str, leaf.shape)),
                leaf.use,
                leaf.adapter or "-",
                f"{leaf.parameters:,}",
                "; ".join(filter(None, (leaf.target, leaf.reason))),
            )
            for leaf in (self.leaves if leaves is None else leaves)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(map(str.ljust, row, widths)).rstrip()  # noqa: B905
            for row in rows
        ]
        trained, left = len(self.adapted), len(self.left_out)
        lines.append(
            f"{self.parameters:,} parameters train in "
            f"{trained} {'leaf' if trained == 1 else 'leaves'}; "
            f"{left} {'matrix is' if left == 1 else 'matrices are'} left out"
        )
        return "\n".join(lines)


def describe(
    params: PyTree,
    targets: Rule | Iterable[Rule],
    kernels: Mapping[str, Kernel] | None = None,
) -> Description:
    """Describes which leaves targets adapt, which matrices they leave out, and why.

    A matrix is a floating leaf with at least two axes longer than one that some
    operation uses as a matrix: a stack of biases, used layer by layer, is not one.

    Args:
      params: the parameter tree; shapes suffice.
      targets: the targets to pass to `lorax.init`.
      kernels: from `lorax.discover`, as for `lorax.init`.

    Returns:
      A `Description`: its `str` is a table; `adapted` and `left_out` are its leaves.

    Raises:
      ValueError: targets that `lorax.init` would refuse.
      KeyError: kernels discovered on another tree.

    Example:
      >>> import jax, jax.numpy as jnp, lorax
      >>> params = {"w": jnp.ones((4, 3)), "table": jnp.ones((9, 4))}
      >>> fn = lambda p, ids: jnp.sum(jnp.tanh(p["table"][ids] @ p["w"]) @ jnp.ones(3))
      >>> kernels = lorax.discover(fn, params, jnp.zeros(2, int))
      >>> found = describe(params, lorax.Target(".*w", rank=2), kernels)
      >>> [(leaf.path, leaf.use, leaf.parameters) for leaf in found.adapted]
      [('w', 'dot: reads 0, writes 1', 14)]
      >>> [(leaf.path, leaf.reason) for leaf in found.left_out]
      [('table', "'.*w' does not match")]
    """
    rules = selection.as_targets(targets)
    chosen = selection.select(params, rules, kernels)
    theirs = selection.own_low_rank(params)
    found = []
    entry: tuple[str | None, str | None, int, str]
    computed = {path: k for path, k in (kernels or {}).items() if k.leaves}
    for path, leaf in sorted({**tree.flatten(params), **computed}.items()):
        if not tree.is_floating(leaf):
            continue
        shape = tuple(leaf.shape)
        known = kernels.get(path) if kernels is not None else None
        if path in chosen:
            target, kernel = chosen[path]
            replaced = adapters.get(target.adapter).replaces
            merged = "" if replaced else _merged(kernel)
            entry = (target.pattern, *_made(target, kernel), merged)
        elif sum(size > 1 for size in shape) < 2 or (known and not known.matrix):
            continue
        else:
            reasons = [selection.why_not(rule, path, kernels, theirs) for rule in rules]
            entry = None, None, 0, "; ".join(dict.fromkeys(filter(None, reasons)))
        use = _use(chosen[path][1] if path in chosen else known)
        found.append(Described(path, shape, use, *entry))
    return Description(tuple(found))


def _use(kernel: Kernel | None) -> str:
    if kernel is None:
        return "unknown"
    if kernel.axes is None:
        return kernel.uses[0].op if kernel.uses else kernel.op
    words = zip(("reads", "writes", "batch"), kernel.axes, strict=True)
    parts = [f"{word} {' '.join(map(str, axes))}" for word, axes in words if axes]
    return f"{kernel.op}: {', '.join(parts)}"


def _merged(kernel: Kernel) -> str:
    """Where an adapted kernel has no low-rank form and is merged."""
    slow = [use for use in kernel.uses if not use.fast]
    if not slow:
        return ""
    more = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
    return f"merged for {slow[0].op!r} at {slow[0].source}{more}"


def _made(target: Target, kernel: Kernel) -> tuple[str, int]:
    """Returns the class and the size of an adapter without computing anything.

    Inits choose values, not shapes, so the standard one stands for all.
    """
    cls = adapters.of_target(target)
    own = {name: v for name, v in dict(target.options).items() if name in cls.options}
    plain = dataclasses.replace(target, init="standard", options=own)

    def make(value: jax.Array) -> Any:
        whole = dataclasses.replace(kernel, value=value)
        key = jax.random.key(0)
        shared = cls.shared(key, {kernel.path: (plain, whole)})
        return adapters.lent_out(cls.make(key, whole, plain, shared))[0]

    made = jax.eval_shape(make, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(made)]
    return type(made).__name__, sum(sizes)
