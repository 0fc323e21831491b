"""Principal components and covariances of the activations that kernels read.

X holds the n rows that a kernel reads, m is their mean and C = X^T X / n - m m^T:

    q <- orthonormal(C q), several times;      C ~ q (q^T C q) q^T

Every product `C q` is a sum of `X^T (X q)` over the batches. The components are thus
those of all batches together, which decomposing one batch after another would only
approximate, and no array is larger than `[in, k]`. The covariance is that with q = 1.

References:
  Halko, Martinsson, Tropp, Finding Structure with Randomness, arXiv:0909.4061.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax import linalg, tree
from lorax.activations import probes
from lorax.activations.probes import Sums
from lorax.adapters import making
from lorax.kernels import Kernel
from lorax.targets import Target
from lorax.types import ActivationStats, Covariance

Chosen = Mapping[str, tuple[Target, Kernel]]
Gradient = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
KEPT = 2  # times the rank: EVA redistributes ranks up to this by default
LIMIT = 2**33
"""Most bytes that the covariances of one call may take together: 8 GiB."""


def principal(
    key: jax.Array, gradient: Gradient, chosen: Chosen, passes: int, width: int
) -> dict[str, ActivationStats]:
    """Returns principal components by subspace iteration, for all kernels at once.

    Args:
      key: seed of the start of every kernel, folded with its path.
      gradient: maps probes to their gradients, summed over the batches.
      chosen: `{path: (target, kernel)}`.
      passes: number of passes over the batches.
      width: columns of the subspace per unit of rank.
    """
    q = {}
    for path, (target, kernel) in chosen.items():
        in_, _, batch = making.sizes(kernel, target)
        shape = *batch, math.prod(in_), _width(width, kernel, target)
        q[path] = jax.random.normal(tree.fold_path(key, path), shape)
    for _ in range(passes - 1):
        found = _summed(gradient, chosen, q)
        q = {p: linalg.orthonormal(_centred(found[p], x)) for p, x in q.items()}
    found, stats = _summed(gradient, chosen, q), {}
    for path, (target, kernel) in chosen.items():
        small = _times(q[path].mT, _centred(found[path], q[path]))
        u, s, _ = linalg.svd(small, _width(KEPT, kernel, target))
        u = _times(q[path], u)
        stats[path] = _components(kernel, target, found[path], u, s)
    return stats


def decomposed(gradient: Gradient, chosen: Chosen) -> dict[str, ActivationStats]:
    """Returns principal components by exact decomposition of whole covariances."""
    stats = {}
    for path, found in _whole(gradient, chosen).items():
        target, kernel = chosen[path]
        eye = jnp.eye(found.product.shape[-1])
        u, s, _ = linalg.svd(_centred(found, eye), _width(KEPT, kernel, target))
        stats[path] = _components(kernel, target, found, u, s)
    return stats


def covariances(gradient: Gradient, chosen: Chosen) -> dict[str, Covariance]:
    """Returns second moments, in one pass over the batches."""
    mean = lambda found: found.product / _some(found)[..., None, None]
    found = _whole(gradient, chosen)
    return {path: Covariance(mean(f), f.tokens) for path, f in found.items()}


def _whole(gradient: Gradient, chosen: Chosen) -> dict[str, Sums]:
    """The sums with q = 1; ValueError if they take too much memory."""
    shapes = {}
    for path, (target, kernel) in chosen.items():
        in_, _, batch = making.sizes(kernel, target)
        shapes[path] = *batch, math.prod(in_), math.prod(in_)
    need = {path: 4 * math.prod(shape) for path, shape in shapes.items()}
    if sum(need.values()) > LIMIT:
        path = max(need, key=need.__getitem__)
        raise ValueError(
            f"{path}: the covariances of what kernels read take "
            f"{sum(need.values()) / 2**30:.1f} GiB, this one {list(shapes[path])} "
            f"alone {need[path] / 2**30:.1f}; the limit is {LIMIT / 2**30:.1f} GiB "
            "together. Calibrate fewer targets at a time and join the results, "
            "{**first, **second}, or give wide kernels another init (EVA needs no "
            "covariance)"
        )
    eyes = {p: jnp.broadcast_to(jnp.eye(s[-1]), s) for p, s in shapes.items()}
    return _summed(gradient, chosen, eyes)


def _summed(
    gradient: Gradient, chosen: Chosen, q: Mapping[str, jax.Array]
) -> dict[str, Sums]:
    given = {path: probes.probe(k, t, q[path]) for path, (t, k) in chosen.items()}
    found = gradient(given)
    sums = {p: probes.sums(k, t, found[p]) for p, (t, k) in chosen.items()}
    for path, one in sums.items():
        if tree.is_concrete(one.tokens) and not jnp.any(one.tokens > 0):
            raise ValueError(
                f"{path}: no row that the kernel reads was counted: the loss of these "
                "batches does not depend on it through a linear operation; give its "
                "target another init, or pass other batches"
            )
    return sums


def _centred(found: Sums, q: jax.Array) -> jax.Array:
    """Returns C q."""
    mean = found.total / _some(found)[..., None]
    project = _times(mean[..., None, :], q)
    return found.product / _some(found)[..., None, None] - mean[..., None] * project


def _components(
    kernel: Kernel, target: Target, found: Sums, u: jax.Array, s: jax.Array
) -> ActivationStats:
    in_, _, batch = making.sizes(kernel, target)
    n = _some(found)[..., None]
    variance = jnp.sum(found.squares / n - (found.total / n) ** 2, -1)
    u = u.reshape(*batch, *in_, u.shape[-1])
    return ActivationStats(u, jnp.sqrt(s), variance, found.tokens)


def _some(found: Sums) -> jax.Array:
    """The number of tokens, or 1 where an expert got none."""
    return jnp.maximum(found.tokens, 1)


def _width(times: int, kernel: Kernel, target: Target) -> int:
    in_, _, _ = making.sizes(kernel, target)
    return min(times * target.rank, math.prod(in_))


def _times(x: jax.Array, y: jax.Array) -> Any:
    return jnp.matmul(x, y, precision=linalg.EXACT)
