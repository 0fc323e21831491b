"""The warnings of `init` about targets that may not do what was meant."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

from lorax import adapters, selection
from lorax.kernels import Kernel
from lorax.targets import ALL_LINEAR, Rule, Target


class TargetWarning(UserWarning):
    """A target may not do what was meant."""


def notice_batch_axes(
    chosen: Mapping[str, tuple[Target, Kernel]], kernels: Mapping[str, Kernel] | None
) -> None:
    """Warns once about leaves that do not batch an axis that their siblings batch.

    Siblings are leaves of the same module with as many axes. A target that sets
    `batch_axes`, even to (), has made the choice and gets no warning.
    """
    found = {}
    for path, (target, kernel) in chosen.items():
        replaced = adapters.get(target.adapter).replaces
        if not replaced and target.batch_axes is None and kernels:
            if doubts := _doubts(kernel, kernels):
                found[path] = doubts
    if not found:
        return
    lines = [
        f"  {path} {chosen[path][1].shape}: axis {axis} is "
        f"{'read' if axis in chosen[path][1].linear_axes().in_ else 'written'} here "
        f"and batched {where}"
        for path, doubts in found.items()
        for axis, where in doubts.items()
    ]
    axes = sorted({axis for doubts in found.values() for axis in doubts})
    warnings.warn(
        "an axis that may number experts gets no factors of its own:\n"
        + "\n".join(lines)
        + f"\nTarget(..., batch_axes={tuple(axes)}) gives each of them a pair of "
        "factors; batch_axes=() keeps the axes as discovered",
        TargetWarning,
        stacklevel=3,
    )


def _doubts(kernel: Kernel, kernels: Mapping[str, Kernel]) -> dict[int, str]:
    """The axes read or written here that other uses batch, and where they do so."""
    doubts: dict[int, str] = {}
    if kernel.op != "dot":  # the axes of a window or a vocabulary are not experts
        return doubts
    own = kernel.linear_axes()
    module = kernel.path.rpartition("/")[0]
    for path, other in sorted(kernels.items()):
        if path.rpartition("/")[0] != module or len(other.shape) != len(kernel.shape):
            continue
        readings = [(use.axes, use.source) for use in other.uses if use.axes]
        for axes, source in readings:
            for axis in {*axes.batch} & {*own.in_, *own.out}:
                if kernel.shape[axis] == other.shape[axis] > 1:
                    where = "" if path == kernel.path else f"by {path} "
                    doubts.setdefault(axis, f"{where}at {source}")
    return doubts


def notice_left_out(
    targets: Rule | Iterable[Rule],
    chosen: Collection[str],
    kernels: Mapping[str, Kernel] | None,
) -> None:
    """Warns once about matrices that "all-linear" cannot trace to a linear operation.

    Embeddings, heads and tables that are added are left out by design, and leaves that
    a target excludes by choice. `lorax.describe` lists them all.
    """
    if kernels is None:
        return
    rules = [t for t in selection.as_targets(targets) if t.pattern == ALL_LINEAR]
    found = {}
    for path, kernel in kernels.items():
        excluded = any(selection.excludes(rule, path) for rule in rules)
        if path in chosen or not rules or excluded or not kernel.matrix:
            continue
        if kernel.refused and kernel.stored is not None:
            found[path] = f"  {path} {kernel.shape}: {kernel.refused}"
        if kernel.op != "other":
            continue
        met = next(
            (u for u in kernel.uses if u.matrix and u.op not in selection.ADDED), None
        )
        if met is not None:
            found[path] = f"  {path} {kernel.shape}: {met.op!r} at {met.source}"
    if found:
        warnings.warn(
            "'all-linear' leaves out matrices used by an operation that is not linear "
            "in them, or that lorax does not follow:\n"
            + "\n".join(found.values())
            + "\nif that is right, list them in exclude=; otherwise give them a target "
            "of their own (adapter='full'), or rewrite the operation",
            TargetWarning,
            stacklevel=3,
        )
