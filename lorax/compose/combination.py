"""Weighted combinations of adapter sets, exact or compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import _checks, linalg, tree
from lorax.adapters import Full, Lora, as_lora, layout, pairs
from lorax.compose import agreement, conversion, deltas, forms
from lorax.compose.forms import Combined
from lorax.types import Adapters, PyTree

METHODS = ("linear", "svd", *deltas.DENSE)


class _Recipe(NamedTuple):
    """How to combine, the same for every path."""

    method: str
    rank: int | None
    density: Any
    key: jax.Array | None
    election: deltas.Election


def combine(
    sets: Sequence[Adapters],
    weights: Sequence[float] | jax.Array,
    method: Literal["linear", "svd", "ties", "dare_linear", "dare_ties"] = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    key: jax.Array | None = None,
    election: deltas.Election = "weighted",
    params: PyTree | None = None,
) -> Combined:
    """Forms the weighted sum of adapter sets of one model, in terms of their *updates*.

        linear:       sum_k w_k s_k a_k b_k = s [a_1, a_2, ...] @ [w_k s_k / s  b_k]
        svd:          linear, then `resize`
        ties:         trim each dense update to `density`, elect signs, average
        dare_linear:  drop entries at random, divide by `density`, add
        dare_ties:    drop, divide, elect signs, average

    "linear" is exact and has no cross terms `a_1 b_2`; its rank is the sum of the
    ranks. If sets have equal a, it is kept once and their b are added, so `combine([x,
    x], [1, -1])` is exactly zero. The dense methods form one matrix at a time, in
    float32, and truncate the result to a rank.

    Args:
      sets: K dicts `{path: Adapter}` for the original base: if an init changed the
        base (PiSSA, OLoRA, LoRA-GA), convert the adapters with `to_lora` first. An
        AdaLora is treated as its Lora form. A set that lacks a path contributes no
        update there.
      weights: K numbers. "ties" and "dare_ties" sum the weighted entries of the sets
        that agree and divide by the number of those sets.
      method: one of the five.
      rank: of the result, for every method except "linear"; by default the sum of the
        ranks, at most min(in, out).
      density: fraction of entries kept, in (0, 1]; for "ties" (0.2 in the paper, per
        matrix here as in PEFT) and DARE.
      key: a `jax.random.key` for DARE; every path and set draws its own numbers.
      election: how "ties" and "dare_ties" elect signs if the weights are unequal:
        "weighted" uses the weighted updates, so a set with weight zero has no say and
        a negative weight votes against; "unweighted" uses the updates as they are, as
        in PEFT. The paper elects before it applies its single factor lambda, which is
        literally "unweighted"; for equal positive weights, the only case in the paper,
        the two are the same.
      params: the base, needed if a path is Full: `base + sum w (value - base)`.

    Returns:
      Adapters in float32 (Full: in their dtype), with the scale and dropout of the
      first set; and by path the relative error of the compression, 0 if there was none.

    Raises:
      ValueError: sets of different models, Dora adapters, adapters whose init changed
        the base, Full adapters without params, invalid weights, or an option that the
        method does not take, or needs but was not given.

    Example:
      >>> import lorax
      >>> lora = lorax.Lora(
      ...     jnp.ones((2, 1)), jnp.ones((1, 2)), 2.0, lorax.Axes((0,), (1,))
      ... )
      >>> adapters, error = combine([{"w": lora}, {"w": lora}], [1.0, -1.0])
      >>> adapters["w"].b.tolist(), float(error["w"])
      ([[0.0, 0.0]], 0.0)

    References:
      Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089. Yadav et
      al., TIES-Merging, arXiv:2306.01708. Yu et al., Language Models are Super Mario,
      arXiv:2311.03099.
    """
    given = agreement.require_sets(sets)
    for adapters in given:
        agreement.require_products(adapters, "combine")
        agreement.refuse_moved(adapters, "combine")
    agreement.require_weights(weights, len(given))
    recipe = _Recipe(method, rank, density, key, election)
    _require_options(recipe)
    agreement.require_overlap(given)
    leaves = None if params is None else tree.flatten(params)
    made: Adapters = {}
    error: dict[str, jax.Array] = {}
    for path in sorted(set().union(*given)):
        parts = {i: s[path] for i, s in enumerate(given) if path in s}
        weights_here = [weights[i] for i in parts]
        kinds = {part.replaces for part in parts.values()}
        if kinds == {True}:
            made[path] = _full(path, parts, weights_here, recipe, leaves)
            error[path] = jnp.zeros(())
            continue
        if kinds == {True, False}:
            agreement.require_same(path, [(f"set {i}", p) for i, p in parts.items()])
        loras = _aligned(path, parts)
        if method in deltas.DENSE:
            keys = _keys(recipe, path, list(parts), pairs.stacked(loras[0])[0].shape[0])
            found = _thinned(path, loras, weights_here, recipe, keys)
        else:
            found = _linear(path, loras, weights_here, recipe)
        made[path], error[path] = found
    return Combined(made, error)


def _require_options(recipe: _Recipe) -> None:
    method, rank, density, key, election = recipe
    _checks.one_of("method", method, METHODS)
    if method == "linear" and rank is not None:
        raise ValueError(
            f"rank={rank}: a linear combination is exact, and its rank is the sum of "
            "the ranks; use method='svd' to compress it"
        )
    _checks.one_of("election", election, deltas.ELECTIONS)
    if election != "weighted" and method not in deltas.SIGNED:
        raise ValueError(
            f"election={election!r}: method={method!r} elects no signs; leave it out, "
            f"or choose one of {', '.join(deltas.SIGNED)}"
        )
    dense = method in deltas.DENSE
    if dense and (not _checks.is_real(density) or not 0 < density <= 1):
        raise ValueError(
            f"density={density}; method={method!r} needs the fraction of entries to "
            "keep, a number in (0, 1], such as 0.2"
        )
    if not dense and density is not None:
        raise ValueError(
            f"density={density}: method={method!r} keeps every entry; leave it out, or "
            f"choose one of {', '.join(deltas.DENSE)}"
        )
    if method in deltas.RANDOM and key is None:
        raise ValueError(
            f"method={method!r} drops entries at random: pass key=jax.random.key(seed)"
        )
    if method not in deltas.RANDOM and key is not None:
        raise ValueError(
            f"method={method!r} is not random; leave key out, or choose one of "
            f"{', '.join(deltas.RANDOM)}"
        )


def _aligned(path: str, parts: Mapping[int, Any]) -> list[Lora]:
    """Returns the adapters as Lora, on the union of their layers."""
    plain = {id(part): as_lora(part) for part in parts.values()}
    subsets = {lora.layers for lora in plain.values()}
    if len(subsets) > 1:
        own = [s for s in subsets if s is not None]
        union = None if None in subsets else tuple(sorted(set().union(*own)))
        depths = [x.a.shape[0] for x in plain.values() if x.layers is None]
        depth = depths[0] if union is None else len(union)
        if union is None and max(max(s) for s in own) >= depth:
            raise ValueError(
                f"{path}: one set adapts a stack of {depth} layers, another adapts "
                f"layers {max(own)}; were they made for different models?"
            )
        place = list(range(depth)) if union is None else list(union)
        plain = {k: _on_layers(x, union, place) for k, x in plain.items()}
    loras = [(f"set {i}", plain[id(part)]) for i, part in parts.items()]
    agreement.require_same(path, loras)
    return [lora for _, lora in loras]


def _on_layers(lora: Lora, union: tuple[int, ...] | None, place: list[int]) -> Lora:
    if lora.layers == union:
        return lora
    own = tuple(place.index(layer) for layer in lora.layers or ())
    a, b = (layout.spread(f, own, len(place)) for f in (lora.a, lora.b))
    return lora.replace(a=a, b=b, layers=union)  # type: ignore[attr-defined]


def _linear(
    path: str, loras: list[Lora], weights: list[Any], recipe: _Recipe
) -> tuple[Lora, jax.Array]:
    """The exact combination; for "svd", truncated to a rank."""
    shared = forms.shared_scale(loras)
    groups: list[tuple[Any, list[list[Any]]]] = []  # (a, [[b, coefficient], ...])
    for lora, weight in zip(loras, weights, strict=True):
        coefficient = weight * (lora.scale / shared)
        terms = next((terms for a, terms in groups if _same(a, lora.a)), None)
        if terms is None:
            groups.append((lora.a, [[lora.b, coefficient]]))
            continue
        term = next((term for term in terms if _same(term[0], lora.b)), None)
        if term is None:
            terms.append([lora.b, coefficient])
        else:  # add the coefficients first, so that no product rounds before cancelling
            term[1] = term[1] + coefficient
    first = loras[0]
    dtype = layout.wide(*(f for lora in loras for f in (lora.a, lora.b)))
    total = [sum(c * b.astype(dtype) for b, c in terms) for _, terms in groups]
    whole: Any = first
    whole = whole.replace(
        a=jnp.concatenate([a.astype(dtype) for a, _ in groups], -1),
        b=jnp.concatenate(total, len(first.axes.batch)).astype(dtype),
        scale=shared,
    )
    if recipe.method == "linear":
        return whole, jnp.zeros(())
    rank = recipe.rank
    if rank is None:
        rank = min(whole.rank, *pairs.features(whole))
    return conversion.resized(path, whole, rank)


def _same(x: jax.Array, y: jax.Array) -> bool:
    """True for the same array, or for two whose values are known to be equal."""
    if x is y:
        return True
    known = tree.is_concrete(x) and tree.is_concrete(y)
    return known and x.dtype == y.dtype and np.array_equal(x, y)


def _thinned(
    path: str,
    loras: list[Lora],
    weights: list[Any],
    recipe: _Recipe,
    keys: jax.Array | None,
) -> tuple[Lora, jax.Array]:
    """TIES or DARE on the dense updates, truncated to a rank."""
    first, rank = loras[0], recipe.rank
    if rank is None:
        rank = min(sum(lora.rank for lora in loras), *pairs.features(first))
    agreement.require_rank(path, first, rank)
    factors = []
    for lora in loras:
        a, b = pairs.stacked(lora)
        factors.append((a, lora.scale * b))
    u, s, vt, cut, square = deltas.compressed(
        factors,
        weights,
        keys,
        method=recipe.method,
        density=float(recipe.density),
        rank=rank,
        election=recipe.election,
    )
    shared = forms.shared_scale(loras)
    wide: Any = first
    wide = wide.replace(
        a=first.a.astype(u.dtype), b=first.b.astype(u.dtype), scale=shared
    )
    made = pairs.with_matrices(wide, *pairs.balanced(u, s, vt, shared))
    return made, forms.relative(jnp.sqrt(cut.sum()), jnp.sqrt(square.sum()))


def _keys(recipe: _Recipe, path: str, sets: list[int], n: int) -> jax.Array | None:
    """Keys `[n, len(sets)]` for the matrices of one path; None if nothing is random.

    They depend on the path and the set's index, so adding a set changes no other draw.
    """
    if recipe.key is None:
        return None
    own = tree.fold_path(recipe.key, path)
    keys = [jax.random.split(jax.random.fold_in(own, i), n) for i in sets]
    return jnp.stack(keys, axis=1)


def _full(
    path: str,
    parts: Mapping[int, Any],
    weights: list[Any],
    recipe: _Recipe,
    leaves: Mapping[str, Any] | None,
) -> Full:
    """A Full adapter whose leaf changes by the combined change of the values."""
    if leaves is None:
        raise ValueError(
            f"{path} is Full: it holds a value, and computing its change needs the "
            "base; pass params=, the tree the adapters were trained on"
        )
    tree.require([path], leaves, "parameter tree")
    base = jnp.asarray(leaves[path])
    for part in parts.values():
        part.check(path, base)
    dtype = layout.wide(base, *(part.value for part in parts.values()))
    start = base.astype(dtype)
    moves = [part.value.astype(dtype) - start for part in parts.values()]
    if recipe.method in deltas.DENSE:
        keys = _keys(recipe, path, list(parts), 1)
        own = None if keys is None else keys[0]
        density = float(recipe.density)
        move = deltas.merged(
            moves, weights, recipe.method, density, own, recipe.election
        )
    else:
        move = jnp.sum(
            jnp.stack([w * m for w, m in zip(weights, moves, strict=True)]), axis=0
        )
    stored = linalg.promoted(*(part.value for part in parts.values()))
    return Full((start + move).astype(stored))
