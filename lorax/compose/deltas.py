"""TIES and DARE: how dense updates are sparsified before they are added.

    TIES:  keep the fraction `density` of every update that is largest in magnitude;
           elect for each entry the sign with the larger total,
               sign sum_k w_k d_k     "weighted"
               sign sum_k d_k         "unweighted"
           sum w_k d_k over the sets that agree, and divide by their number.
    DARE:  drop entries at random and divide the kept ones by `density`,
           so that the update is unbiased.

References:
  Yadav et al., TIES-Merging: Resolving Interference When Merging Models,
  arXiv:2306.01708. Yu et al., Language Models are Super Mario: Absorbing Abilities from
  Homologous Models as a Free Lunch, arXiv:2311.03099.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lorax import linalg
from lorax.compose import forms

Election = Literal["weighted", "unweighted"]
ELECTIONS = ("weighted", "unweighted")
DENSE = ("ties", "dare_linear", "dare_ties")
RANDOM = ("dare_linear", "dare_ties")
SIGNED = ("ties", "dare_ties")


def merged(
    deltas: list[jax.Array],
    weights: list[Any],
    method: str,
    density: float,
    keys: jax.Array | None,
    election: Election = "weighted",
) -> jax.Array:
    """Merges K updates of one shape into one.

    Args:
      deltas: K arrays.
      weights: K numbers.
      method: one of DENSE.
      density: the fraction of entries kept, in (0, 1].
      keys: `[K]` keys for DARE, else None.
      election: whether the weighted or the unweighted entries elect the signs.
    """
    if keys is None:
        thin = [trim(delta, density) for delta in deltas]
    else:
        thin = [drop(keys[i], delta, density) for i, delta in enumerate(deltas)]
    weighted = jnp.stack([w * delta for w, delta in zip(weights, thin, strict=True)])
    if method == "dare_linear":
        return weighted.sum(0)
    voters = weighted if election == "weighted" else jnp.stack(thin)
    return disjoint_mean(weighted, voters)


def trim(delta: jax.Array, density: float) -> jax.Array:
    """Keeps the entries largest in magnitude, at least one, with ties at the cutoff."""
    keep = max(1, round(density * delta.size))
    edge = jnp.sort(jnp.abs(delta), axis=None)[delta.size - keep]
    return jnp.where(jnp.abs(delta) >= edge, delta, 0.0)


def drop(key: jax.Array, delta: jax.Array, density: float) -> jax.Array:
    """Keeps each entry with probability `density`, and divides it by `density`."""
    kept = jax.random.bernoulli(key, density, delta.shape)
    return jnp.where(kept, delta / density, 0.0)


def disjoint_mean(deltas: jax.Array, voters: jax.Array) -> jax.Array:
    """Averages over axis 0 the entries whose voter agrees in sign with the voters' sum.

    A sum of exactly zero elects the positive sign, as in PEFT.

    Args:
      deltas: `[K, ...]`, the entries to average.
      voters: `[K, ...]`, the entries whose signs count.
    """
    elected = jnp.where(voters.sum(0) >= 0, 1.0, -1.0)
    agree = jnp.sign(voters) == elected
    total = jnp.where(agree, deltas, 0.0).sum(0)
    return total / jnp.maximum(agree.sum(0, dtype=total.dtype), 1)


@functools.partial(jax.jit, static_argnames=("method", "density", "rank", "election"))
def compressed(
    pairs: list[tuple[jax.Array, jax.Array]],
    weights: list[Any],
    keys: jax.Array | None,
    *,
    method: str,
    density: float,
    rank: int,
    election: Election,
) -> tuple[jax.Array, ...]:
    """Merges the dense updates of K pairs of factors, truncating the result to a rank.

    Only one matrix of a stack is dense at a time.

    Args:
      pairs: K pairs `a: [n, in, r_k]` and `b: [n, r_k, out]`, with the scale folded in.
      weights: K numbers.
      keys: `[n, K]` keys, or None.
      method: one of DENSE.
      density: the fraction of entries kept.
      rank: of the result.
      election: as in `merged`.

    Returns:
      `u: [n, in, rank]`, `s: [n, rank]`, `vt: [n, rank, out]`, and the squared
      Frobenius norms `[n]` of what was cut off and of the whole matrix.
    """

    def one(given: Any) -> tuple[jax.Array, ...]:
        pairs, keys = given
        dense = [linalg.dot(a, b) for a, b in pairs]
        whole = merged(dense, weights, method, density, keys, election)
        return forms.truncated(whole, rank)

    return jax.lax.map(one, (pairs, keys))
