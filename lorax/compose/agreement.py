"""What sets of adapters must have in common, and what is said where they have not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorax import _checks
from lorax.adapters import pairs, ranks
from lorax.types import Adapters


def require_sets(sets: Any) -> list[Adapters]:
    """Returns a list of adapter dicts; raises for one dict, or for none."""
    given = [sets] if isinstance(sets, Mapping) else list(sets)
    if isinstance(sets, Mapping) or not all(isinstance(s, Mapping) for s in given):
        raise TypeError(
            "sets is a list of adapter dicts, [{path: Adapter}, ...]; it was given "
            f"{type(sets).__name__} of {sorted({type(s).__name__ for s in given})}"
        )
    if not given:
        raise ValueError("sets is empty: give at least one {path: Adapter}")
    return [dict(s) for s in given]


def require_same(path: str, members: Sequence[tuple[str, Any]]) -> None:
    """Raises ValueError unless adapters change one kernel in the same way.

    Args:
      path: of the kernel.
      members: `(who, adapter)`; classes, axes and sizes but for the rank must agree.
    """
    first_name, first = members[0]
    for name, other in members[1:]:
        if (one := getattr(first, "lent", ())) != (two := getattr(other, "lent", ())):
            raise ValueError(
                f"{path}: {first_name} has the frozen arrays {dict(one)}, {name} "
                f"{dict(two)}, and there is one Base: give all sets the same, by "
                "lorax.init(key, base, targets), base what the first one returned"
            )
        ours, theirs = (f"{type(a).__name__} with {_sizes(a)}" for a in (first, other))
        if type(first) is not type(other) or ours != theirs:
            raise ValueError(
                f"{path}: {first_name} has {ours}, {name} {theirs}; "
                "adapters of one kernel must agree in all but rank and scale: were "
                "they made for different models? (compose.to_lora turns AdaLora into "
                "Lora)"
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
        return f"shapes but for the rank {shapes}, {adapter.axes}"
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
            f"{what} needs updates that are products of factors, and {[*others]} are "
            f"{', '.join(sorted({*others.values()}))}, whose updates neither add nor "
            "scale; merge each set and read it back as Lora with compose.extract("
            "params, lorax.merge(adapters, params), targets)"
        )


def base_of(adapter: Any) -> str:
    """Returns which base an adapter fits, for messages."""
    moved_by = getattr(adapter, "moved_by", None)
    return f"what {moved_by} left of the base" if moved_by else "the base as given"


def require_one_base(path: str, members: Sequence[tuple[str, Any]]) -> None:
    """Raises ValueError unless adapters fit one and the same base.

    Args:
      path: of the kernel.
      members: `(who, adapter)`.
    """
    first_name, first = members[0]
    for name, other in members[1:]:
        if base_of(first) != base_of(other):
            raise ValueError(
                f"{path}: {first_name} fits {base_of(first)}, {name} "
                f"{base_of(other)}; write each set for the base as given, "
                "compose.to_lora(adapters, initial), initial what lorax.init returned "
                "for it, or start all of them from one lorax.init"
            )


def refuse_moved(adapters: Adapters, what: str) -> None:
    """Raises ValueError naming the paths whose update holds a part of the kernel."""
    for path, adapter in adapters.items():
        if getattr(adapter, "moved_by", None):
            raise ValueError(
                f"{path}: the adapter fits {base_of(adapter)}: its update holds that "
                f"part of the kernel, which {what} would change as well; write the set "
                "for the base as given first, compose.to_lora(adapters, initial), "
                "initial what lorax.init returned"
            )


def require_rank(path: str, adapter: Any, rank: int) -> None:
    """Raises ValueError unless `rank` is a whole number from 1 to min(in, out)."""
    in_, out = pairs.features(adapter)
    if not _checks.is_whole(rank) or not 1 <= rank <= min(in_, out):
        raise ValueError(
            f"{path}: rank={rank} of a kernel that reads {in_} and writes {out}; give "
            f"a whole number from 1 to {min(in_, out)}, or treat this path apart "
            "(lorax.tree.partition)"
        )


def require_overlap(sets: list[Adapters]) -> None:
    """Raises ValueError for a set that shares no path with the others."""
    for i, adapters in enumerate(sets):
        others = set().union(*(s for j, s in enumerate(sets) if j != i))
        if len(sets) > 1 and not adapters.keys() & others:
            raise ValueError(
                f"set {i} has the paths {sorted(adapters)} and shares none with the "
                f"others, {sorted(others)}: are these adapters of different models? "
                "lorax.tree.combine puts disjoint sets of one model side by side"
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
