"""How much two adapters span the same directions.

    phi(A, B, i, j) = |U_i^T V_j|_F^2 / min(i, j)        in [0, 1]

with U_i the i leading singular directions of one adapter and V_j the j leading ones of
the other: 1 if the smaller space is contained in the larger, and max(i, j) / n on
average for random subspaces of n dimensions.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685,
  section 7.2 and appendix G.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from lorax import _checks, linalg, tree
from lorax.analysis import _thin
from lorax.types import Adapters

Of = Literal["a", "b", "in", "out"]
OF = ("a", "b", "in", "out")


def subspace_similarity(
    first: Adapters, second: Adapters, of: Of = "a"
) -> dict[str, jax.Array]:
    """Returns phi for every pair of leading dimensions, by path.

    Use it to compare ranks (8 against 64), seeds, layers or tasks. The adapters must
    fit the same kernels, but their ranks may differ.

    Args:
      first: `{path: Adapter}`.
      second: `{path: Adapter}`; the paths in both are compared.
      of: "a": the input directions of the factor that reads, as in the paper; "b": the
        output directions of the factor that writes; "in", "out": those of the whole
        update `scale * a @ b`, which weights directions by their effect.

    Returns:
      `{path: [*stack, r1, r2]}`; entry (i - 1, j - 1) is phi(i, j). Directions with
      singular value zero are noise: at the standard init, all of b's are.

    Raises:
      ValueError: an unknown `of`, no path in common, or kernels of different sizes.

    Example:
      >>> import lorax
      >>> make = lambda a: lorax.Lora(a, jnp.ones((2, 3)), 1.0, lorax.Axes((0,), (1,)))
      >>> x, y = jnp.eye(4)[:, :2] * jnp.array([2.0, 1.0]), jnp.eye(4)[:, 1:3]
      >>> phi = subspace_similarity({"w": make(x)}, {"w": make(y)})["w"]
      >>> phi.round(3).tolist()[1][1]  # one of two directions is shared
      0.5
    """
    _checks.one_of("of", of, OF)
    first = _thin.chosen(first, "subspace_similarity")
    second = _thin.chosen(second, "subspace_similarity")
    both = [path for path in first if path in second]
    if not both:
        raise ValueError(
            f"the adapters have no path in common: the first has {sorted(first)[:3]}; "
            f"in the second, {tree.nearest(next(iter(first)), second)}"
        )
    return {path: _phi(path, first[path], second[path], of) for path in both}


def random_similarity(size: int, i: int, j: int) -> float:
    """Returns the average of phi for random subspaces: `max(i, j) / size`.

    Args:
      size: dimension of the space: the kernel's number of inputs or outputs.
      i: dimension of one subspace.
      j: dimension of the other.
    """
    return max(i, j) / size


def _phi(path: str, one: Any, other: Any, of: str) -> jax.Array:
    u, v = _directions(one, of), _directions(other, of)
    if u.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{path}: directions of shape {u.shape} and {v.shape}; both adapters must "
            "fit the same kernel, with factors for the same layers"
        )
    cosines = linalg.dot(u.mT, v)  # [*stack, r1, r2]
    sums = jnp.cumsum(jnp.cumsum(cosines**2, -2), -1)
    i, j = (jnp.arange(1, n + 1, dtype=sums.dtype) for n in cosines.shape[-2:])
    return sums / jnp.minimum(i[:, None], j[None, :])


def _directions(adapter: Any, of: str) -> jax.Array:
    """Orthonormal directions `[*stack, size, rank]`, leading ones first."""
    a, b = _thin.product(adapter)
    if of in ("a", "b"):
        factor = a if of == "a" else b.mT
        return linalg.svd(factor, min(factor.shape[-2:]))[0]
    u, _, vt = linalg.low_rank_svd(a, b)
    return u if of == "in" else vt.mT
