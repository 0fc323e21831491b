"""What adapter sets must have in common, and the errors raised if they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorax import _checks
from lorax.adapters import pairs, ranks
from lorax.types import Adapters


def require_sets(sets: Any) -> list[Adapters]:
    """Returns a list of adapter dicts; raises for a single dict or an empty list."""
    given = [sets] if isinstance(sets, Mapping) else list(sets)
    if isinstance(sets, Mapping) or not all(isinstance(s, Mapping) for s in given):
        raise TypeError(
            "sets must be a list of adapter dicts, [{path: Adapter}, ...]; got "
            f"{type(sets).__name__} of {sorted({type(s).__name__ for s in given})}"
        )
    if not given:
        raise ValueError("sets is empty: give at least one {path: Adapter}")
    return [dict(s) for s in given]


def require_same(path: str, members: Sequence[tuple[str, Any]]) -> None:
    """Raises ValueError unless adapters change one kernel in the same way.

    Args:
      path: the kernel's path.
      members: `(who, adapter)`; class, axes and sizes except the rank must agree.
    """
    first_name, first = members[0]
    for name, other in members[1:]:
        if (one := getattr(first, "lent", ())) != (two := getattr(other, "lent", ())):
            raise ValueError(
                f"{path}: {first_name} has the frozen arrays {dict(one)} and {name} "
                f"{dict(two)}, but there is only one Base: give all sets the same "
                "arrays with lorax.init(key, base, targets), where base is what the "
                "first call returned"
            )
        ours, theirs = (f"{type(a).__name__} with {_sizes(a)}" for a in (first, other))
        if type(first) is not type(other) or ours != theirs:
            raise ValueError(
                f"{path}: {first_name} has {ours}, {name} {theirs}; "
                "adapters of one kernel may differ only in rank and scale: were they "
                "made for different models? (compose.to_lora turns AdaLora into Lora)"
            )


def _sizes(adapter: Any) -> str:
    """The axes and sizes of the kernel that an adapter fits, as text."""
    if adapter.replaces:
        return f"shape {tuple(adapter.value.shape)}"
    if not pairs.has_factors(adapter):
        own = ranks.axes_of(adapter) if adapter.padded else {}
        shapes = {
            name: [n for i, n in enumerate(field.shape) if i != own.get(name)]
            for name, field in (
                (name, getattr(adapter, name)) for name in adapter.roles
            )
        }
        return f"shapes (without the rank) {shapes}, {adapter.axes}"
    first, last = pairs.factors_of(adapter)
    n = len(adapter.axes.batch)
    stack = f"stack {first.shape[:n]}, layers {adapter.layers}, " if n else ""
    return f"in {first.shape[n:-1]}, out {last.shape[n + 1 :]}, {stack}{adapter.axes}"


def require_products(adapters: Adapters, what: str) -> None:
    """Raises ValueError naming the paths whose update is not a product of factors."""
    others = {
        path: type(a).__name__
        for path, a in adapters.items()
        if not a.replaces and a.as_lora() is None
    }
    if others:
        raise ValueError(
            f"{what} needs updates that are products of factors; {[*others]} are "
            f"{', '.join(sorted({*others.values()}))}, whose updates cannot be added "
            "or scaled; merge each set and convert it to Lora with compose.extract("
            "params, lorax.merge(adapters, params), targets)"
        )


def base_of(adapter: Any) -> str:
    """Returns which base an adapter belongs to, for messages."""
    moved_by = getattr(adapter, "moved_by", None)
    return f"the base as {moved_by} left it" if moved_by else "the original base"


def require_one_base(path: str, members: Sequence[tuple[str, Any]]) -> None:
    """Raises ValueError unless adapters belong to the same base.

    Args:
      path: the kernel's path.
      members: `(who, adapter)`.
    """
    first_name, first = members[0]
    for name, other in members[1:]:
        if base_of(first) != base_of(other):
            raise ValueError(
                f"{path}: {first_name} belongs to {base_of(first)}, {name} to "
                f"{base_of(other)}; rewrite each set for the original base with "
                "compose.to_lora(adapters, initial), where initial is what lorax.init "
                "returned for it, or start all sets from one lorax.init"
            )


def refuse_moved(adapters: Adapters, what: str) -> None:
    """Raises ValueError naming a path whose update contains part of the kernel."""
    for path, adapter in adapters.items():
        if getattr(adapter, "moved_by", None):
            raise ValueError(
                f"{path}: the adapter belongs to {base_of(adapter)}: its update "
                f"contains part of the kernel, which {what} would change as well; "
                "first rewrite the set for the original base with compose.to_lora("
                "adapters, initial), where initial is what lorax.init returned"
            )


def require_rank(path: str, adapter: Any, rank: int) -> None:
    """Raises ValueError unless `rank` is a whole number from 1 to min(in, out)."""
    in_, out = pairs.features(adapter)
    if not _checks.is_whole(rank) or not 1 <= rank <= min(in_, out):
        raise ValueError(
            f"{path}: rank={rank} for a kernel with {in_} inputs and {out} outputs; "
            f"give a whole number from 1 to {min(in_, out)}, or handle this path "
            "separately (lorax.tree.partition)"
        )


def require_overlap(sets: list[Adapters]) -> None:
    """Raises ValueError for a set that shares no path with the others."""
    for i, adapters in enumerate(sets):
        others = set().union(*(s for j, s in enumerate(sets) if j != i))
        if len(sets) > 1 and not adapters.keys() & others:
            raise ValueError(
                f"set {i} has the paths {sorted(adapters)} and shares none with the "
                f"others, {sorted(others)}: are these adapters of different models? "
                "To join disjoint sets of one model, use lorax.tree.combine"
            )


def require_weights(weights: Any, size: int) -> None:
    """Raises ValueError unless there is one finite number per set."""
    if len(weights) != size:
        raise ValueError(
            f"{len(weights)} weights for {size} sets; give one number per set"
        )
    for i, weight in enumerate(weights):
        if _checks.is_real(weight) and not _checks.is_finite(weight):
            raise ValueError(f"weights[{i}] is {weight}; give finite numbers")
