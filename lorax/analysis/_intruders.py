"""Intruder dimensions: leading directions of the tuned kernel that the base lacks.

    y_j is an intruder  <=>  max_i |cos(y_j, x_i)| < threshold,     j = 1..k

with y_j the j-th singular vector of the adapted kernel and x_i those of the pretrained
one. The paper finds them in LoRA, not in full fine-tuning.

References:
  Shuttleworth et al., LoRA vs Full Fine-tuning: An Illusion of Equivalence,
  arXiv:2410.21228, algorithm 1.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lorax import _checks, linalg, tree
from lorax.adapters import layout
from lorax.analysis import _thin
from lorax.types import Adapters, Factors, PyTree


class Intruders(NamedTuple):
    """The intruder dimensions of a kernel.

    Attributes:
      number: `[*stack]` int32, intruders among the k leading directions.
      cosines: `[*stack, k]`, each direction's largest |cosine| with any of the base's.
    """

    number: jax.Array
    cosines: jax.Array


def intruder_dimensions(
    key: jax.Array,
    adapters: Adapters,
    params: PyTree,
    *,
    k: int = 10,
    threshold: float = 0.5,
    against: int | None = None,
    side: Literal["in", "out"] = "out",
) -> dict[str, Intruders]:
    """Counts the intruder dimensions of every adapted kernel, by path.

    The adapted kernel is decomposed with thin products of W and the factors, one kernel
    of a stack at a time.

    Args:
      key: for the randomised decompositions.
      adapters: `{path: Adapter}`; a Dora's magnitudes are taken into account.
      params: the base that they were trained on.
      k: how many leading directions of the adapted kernel to test; 10 as in the paper.
      threshold: threshold on the cosine; 0.5, the middle of the paper's figures.
      against: how many leading directions of the base to compare with; None for all, by
        a full decomposition of W, as the paper defines it (beyond a few thousand
        features this takes minutes and several times W's memory). A number makes it
        cheap, but directions similar to W's later ones then also count as intruders.
      side: "out" as in the paper (the left vectors of PyTorch's `[out, in]`), or "in".

    Returns:
      `{path: Intruders}`.

    Raises:
      ValueError: no adapter has factors, one does not fit, k or against is below 1, or
        side is unknown.
      KeyError: a path that params lacks.
    """
    for name, value in (("k", k), ("against", against)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; give a number of directions >= 1")
    _checks.one_of("side", side, ("in", "out"))
    whole, leaves = _thin.on_leaves(adapters, params)
    chosen = _thin.chosen(whole, "intruder_dimensions")

    def measured(path: str, adapter: Any) -> Intruders:
        leaf = leaves[path]
        kernel = layout.matrices(leaf, adapter.axes)
        factors = _flat(_thin.factors(adapter, leaf), kernel)
        own = tree.fold_path(key, path)
        cosines = _mapped(
            lambda w, f: _cosines(own, w, f, k, against, side), kernel, factors
        )
        number = jnp.sum(cosines < threshold, -1, dtype=jnp.int32)
        return Intruders(number, cosines)

    return tree.map_adapters(measured, chosen)


def _cosines(
    key: jax.Array,
    kernel: jax.Array,
    factors: Factors,
    k: int,
    against: int | None,
    side: str,
) -> jax.Array:
    """The cosines `[k]` of one kernel `[in, out]`."""
    keys, size = jax.random.split(key), min(kernel.shape)
    tuned = linalg.randomized_svd(
        keys[0], kernel, min(k, size), factors=factors, **linalg.CLOSE
    )
    if against is None or against >= size:
        base = linalg.svd(kernel, size)
    else:
        base = linalg.randomized_svd(keys[1], kernel, against, **linalg.CLOSE)
    ours, theirs = (
        found[0] if side == "in" else found[2].mT for found in (tuned, base)
    )  # [size, k]
    overlap = linalg.dot(ours.mT, theirs)
    return jnp.abs(overlap).max(-1)


def _flat(factors: Factors, kernel: jax.Array) -> Factors:
    """The factors with in and out axes flattened, in the kernel's dtype."""
    *batch, n, m = kernel.shape
    rank, gain = factors.a.shape[-1], factors.gain
    return Factors(
        factors.a.astype(kernel.dtype).reshape(*batch, n, rank),
        factors.b.astype(kernel.dtype).reshape(*batch, rank, m),
        None if gain is None else gain.astype(kernel.dtype).reshape(*batch, m),
    )


def _mapped(function: Any, kernel: jax.Array, factors: Factors) -> jax.Array:
    """Maps over the matrices of a stack one by one, to save working memory."""
    batch = kernel.shape[:-2]
    if not batch:
        return function(kernel, factors)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), factors)
    stacked = kernel.reshape(-1, *kernel.shape[-2:])
    found = jax.lax.map(lambda given: function(*given), (stacked, flat))
    return found.reshape(*batch, -1)
