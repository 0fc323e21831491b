"""Many adapter sets of one shape: stacked for vmap, or swapped in a compiled function.

Unequal ranks are padded with zeros in both factors, which leaves every update as it is
(and the padding gets no gradient, since each factor's gradient is proportional to the
other factor). Unequal scales are folded into b (for an AdaLora, into lam), which leaves
the updates as they are too, but changes how Adam trains them: fold for inference only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lorax import _checks, tree
from lorax.adapters import ranks
from lorax.compose import agreement, forms
from lorax.types import Adapters


def stack(
    sets: Sequence[Adapters], missing: Literal["error", "zero"] = "error"
) -> Adapters:
    """Stacks K adapter sets on a leading axis of every array, for `jax.vmap`.

    Ranks are padded with zeros to the largest. If scales differ, all take the first and
    b absorbs the ratio; use that for inference only, since it changes how Adam trains.

    Args:
      sets: K dicts `{path: Adapter}` for one model: the same classes, axes, sizes,
        dropout and layers at every path, and one base. If an init changed the base
        (PiSSA, OLoRA, LoRA-GA), the sets must come from one `lorax.init`; inits that
        differ only in data or key cannot be told apart.
      missing: "error": every set must have the same paths; "zero": a set that lacks a
        Lora or AdaLora another set has gets a zero update there.

    Returns:
      `{path: Adapter}` whose arrays have a leading axis K. Its adapters fit a kernel
      only inside a `vmap` over that axis, or through `route`.

    Raises:
      ValueError: the sets differ in more than rank and scale; the message names the
        paths.

    Example:
      >>> import lorax
      >>> make = lambda rank: lorax.Lora(
      ...     jnp.ones((4, rank)), jnp.ones((rank, 3)), 2.0, lorax.Axes((0,), (1,))
      ... )
      >>> stacked = stack([{"w": make(1)}, {"w": make(2)}])
      >>> stacked["w"].a.shape, [s["w"].rank for s in unstack(stacked)]
      ((2, 4, 2), [1, 2])
    """
    _checks.one_of("missing", missing, ("error", "zero"))
    given = agreement.require_sets(sets)
    paths = sorted(set().union(*given))
    if missing == "error":
        _require_paths(paths, given)
    stacked: Adapters = {}
    for path in paths:
        members = [(i, s[path]) for i, s in enumerate(given) if path in s]
        _require_stackable(path, members)
        if len(members) < len(given):
            absent = [i for i, s in enumerate(given) if path not in s]
            zero = _zero(path, members[0][1], absent)
            members = [(i, s.get(path, zero)) for i, s in enumerate(given)]
        stacked[path] = _stacked([adapter for _, adapter in members])
    return stacked


def _require_paths(paths: list[str], sets: list[Adapters]) -> None:
    for i, adapters in enumerate(sets):
        if lacking := [path for path in paths if path not in adapters]:
            raise ValueError(
                f"set {i} has no adapter for {lacking}, which another set has; pass "
                "missing='zero' to give it zero updates there, or train the same paths"
            )


def _require_stackable(path: str, members: list[tuple[int, Any]]) -> None:
    named = [(f"set {i}", adapter) for i, adapter in members]
    agreement.require_same(path, named)
    agreement.require_one_base(path, named)
    i, first = members[0]
    for j, other in members[1:]:
        one, two = forms.statics(first), forms.statics(other)
        if differ := sorted(name for name in one if one[name] != two[name]):
            ours, theirs = (
                ", ".join(f"{k}={own[k]}" for k in differ) for own in (one, two)
            )
            raise ValueError(
                f"{path}: set {i} has {ours} and set {j} {theirs}, but a stack has "
                "one value for all; make them equal with adapter.replace(...)"
            )


def _zero(path: str, like: Any, absent: list[int]) -> Any:
    """An adapter of the same shape whose update is zero."""
    if not like.additive:
        raise ValueError(
            f"{path}: sets {absent} lack it, and a {type(like).__name__} of zeros is "
            "not a zero update (it replaces or rescales the kernel); give those sets "
            "an adapter from lorax.init there"
        )
    if getattr(like, "moved_by", None):
        raise ValueError(
            f"{path}: sets {absent} lack it, and the others belong to "
            f"{agreement.base_of(like)}, where zero factors do not restore the kernel; "
            "first rewrite them for the original base with compose.to_lora(adapters, "
            "initial), where initial is what lorax.init returned"
        )
    return jax.tree.map(jnp.zeros_like, like)


def _stacked(members: list[Any]) -> Any:
    first = members[0]
    if hasattr(first, "scale"):
        same = all(member.scale == first.scale for member in members)
        scale = first.scale if same else forms.shared_scale(members)
        members = [forms.rescaled(member, scale) for member in members]
    if first.padded:
        rank = max(member.rank for member in members)
        members = [ranks.padded(member, rank) for member in members]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def unstack(stacked: Adapters) -> list[Adapters]:
    """Splits what `stack` made, dropping ranks that are zero in every factor.

    Args:
      stacked: `{path: Adapter}` with a leading axis K on every array, concrete.

    Returns:
      K dicts. The scale is the stack's, so b may include a folded ratio; an adapter
      that is zero throughout keeps rank 1.

    Raises:
      ValueError: the arrays have no common leading axis, or their values, on which the
        true ranks depend, cannot be read (inside `jit`).
    """
    size = count(stacked)
    for path, adapter in stacked.items():
        if not all(map(tree.is_concrete, jax.tree.leaves(adapter))):
            raise ValueError(
                f"{path}: unstack looks for ranks that are zero, but these arrays are "
                "traced and have no values; call it outside jit, or index the stack "
                "yourself: jax.tree.map(lambda v: v[k], stacked)"
            )
    used = tree.map_adapters(lambda _, adapter: _ranks(adapter), stacked)

    def member(k: int) -> Adapters:
        own = jax.tree.map(lambda leaf: leaf[k], stacked)
        return {path: ranks.cut(a, int(used[path][k])) for path, a in own.items()}

    return [member(k) for k in range(size)]


def count(stacked: Adapters) -> int:
    """Returns K, the size of the leading axis of every array in a stack.

    Raises:
      ValueError: the arrays do not share one; the message names the paths.
    """
    sizes: dict[int, str] = {}
    for path, adapter in stacked.items():
        for leaf in jax.tree.leaves(adapter):
            sizes.setdefault(leaf.shape[0] if leaf.ndim else 0, path)
    if len(sizes) != 1:
        found = ", ".join(f"{size} at {path!r}" for size, path in sizes.items())
        raise ValueError(
            f"the adapters have no common leading axis ({found or 'no arrays'}); make "
            "the stack with compose.stack([adapters, ...])"
        )
    return next(iter(sizes))


def _ranks(stacked: Any) -> np.ndarray:
    """The rank that each adapter uses, without trailing zeros: `[K]`, at least 1."""
    if not stacked.padded:
        return np.zeros(len(jax.tree.leaves(stacked)[0]), int)
    member = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], stacked))
    used: Any = False
    for name, axis in ranks.axes_of(member).items():
        field = np.asarray(getattr(stacked, name)) != 0
        rest = tuple(d for d in range(1, field.ndim) if d != axis + 1)
        used = used | field.any(rest)  # [K, rank]
    return np.maximum((used * np.arange(1, used.shape[1] + 1)).max(1), 1)


def switch(adapters: Adapters, like: Adapters) -> Adapters:
    """Gives adapters the exact form of others, to swap them in a compiled function.

    Ranks are padded with zeros and b absorbs the ratio of the scales, so the result has
    `like`'s structure (including static fields), shapes, dtypes and, if `like` was
    placed on devices, its sharding: a function compiled for `like` runs it unchanged.

    Args:
      adapters: `{path: Adapter}` of the same classes, axes and sizes as `like`.
      like: the adapters that the function was compiled for, as arrays or
        `jax.ShapeDtypeStruct`s.

    Returns:
      The same updates in `like`'s form.

    Raises:
      ValueError: the paths, classes, sizes, layers or base differ from `like`'s, the
        rank is larger, or a scale in `like` is zero.

    Example:
      >>> import lorax
      >>> make = lambda rank, scale: lorax.Lora(
      ...     jnp.ones((4, rank)), jnp.ones((rank, 3)), scale, lorax.Axes((0,), (1,))
      ... )
      >>> swapped = switch({"w": make(1, 6.0)}, like={"w": make(2, 2.0)})
      >>> swapped["w"].scale, swapped["w"].b.tolist()
      (2.0, [[3.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    """
    if differ := sorted(adapters.keys() ^ like.keys()):
        raise ValueError(
            f"adapters and like differ in the paths {differ}; a compiled function "
            "takes the paths it was compiled for"
        )
    return {path: _switched(path, adapters[path], like[path]) for path in like}


def _switched(path: str, adapter: Any, like: Any) -> Any:
    both = [("the adapter", adapter), ("like", like)]
    agreement.require_same(path, both)
    agreement.require_one_base(path, both)
    if like.padded:
        if adapter.rank > like.rank:
            raise ValueError(
                f"{path}: the adapter has rank {adapter.rank} and like {like.rank}; "
                f"compress it with compose.resize(adapters, {like.rank}), or compile "
                "for adapters of the largest rank"
            )
        adapter = ranks.padded(adapter, like.rank)
    if hasattr(like, "scale"):
        if like.scale == 0 != adapter.scale:
            raise ValueError(
                f"{path}: like has scale 0, so every update would be zero; compile for "
                "adapters with a nonzero scale"
            )
        adapter = forms.rescaled(adapter, like.scale)
    fields = {
        name: _placed(getattr(adapter, name), getattr(like, name))
        for name in like.roles
    }
    return like.replace(**fields)


def _placed(value: Any, like: Any) -> jax.Array:
    """The value in `like`'s dtype and, if `like` was put on devices, on those."""
    value = jnp.asarray(value, like.dtype)
    if tree.is_concrete(like) and getattr(like, "committed", False):
        return jax.device_put(value, like.sharding)
    return value
