"""How an update relates to the kernel it changes.

    amplification = |D|_F / |U^T W V|_F,       D = s a b = U diag(sigma) V^T

The denominator is how much of the kernel itself lies in the directions of its update.
The paper compares it with W's own leading directions (the maximum) and with random
ones: LoRA amplifies directions that are present in W, but not its dominant ones.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685,
  section 7.3, table 7, and appendix H.4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import linalg, tree
from lorax.adapters import layout
from lorax.analysis import _thin
from lorax.types import Adapters, PyTree


class Amplification(NamedTuple):
    """Frobenius norms, each `[*stack]`.

    Attributes:
      update: |D|_F, of its `rank` leading directions if `rank` was given.
      projected: |U^T W V|_F with the directions of D.
      own: |U^T W V|_F with W's own leading directions: the maximum.
      random: |U^T W V|_F with random directions, from one draw.
      kernel: |W|_F.
    """

    update: jax.Array
    projected: jax.Array
    own: jax.Array
    random: jax.Array
    kernel: jax.Array

    @property
    def factor(self) -> jax.Array:
        """The amplification; `inf` if W is zero in the update's directions."""
        return self.update / self.projected


def amplification(
    key: jax.Array, adapters: Adapters, params: PyTree, rank: int | None = None
) -> dict[str, Amplification]:
    """Returns how much every update amplifies directions of its kernel, by path.

    W only enters thin products and is never fully decomposed: `own` comes from
    `linalg.randomized_svd`.

    Args:
      key: for the random directions and the randomised decomposition.
      adapters: `{path: Adapter}`; for a Dora, the change of its directions counts.
      params: the base. After an init that moves a part of the kernel, use the original
        base and `lorax.compose.to_lora(trained, initial)`.
      rank: how many leading directions of the update to use; None for all.

    Returns:
      `{path: Amplification}`.

    Raises:
      ValueError: no adapter has factors, one does not fit, or rank is below 1.
      KeyError: a path that params lacks.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}; give a number >= 1, or None for all directions")
    whole, leaves = _thin.on_leaves(adapters, params)
    chosen = _thin.chosen(whole, "amplification")
    return {
        path: _measured(tree.fold_path(key, path), adapter, leaves[path], rank)
        for path, adapter in chosen.items()
    }


def _measured(
    key: jax.Array, adapter: Any, leaf: jax.Array, rank: int | None
) -> Amplification:
    kernel = layout.matrices(leaf, adapter.axes)
    if getattr(adapter, "layers", None) is not None:
        kernel = kernel[jnp.asarray(adapter.layers)]
    u, s, vt = linalg.low_rank_svd(*_thin.product(adapter))
    k = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    u, s, vt = u[..., :k], s[..., :k], vt[..., :k, :]
    keys = jax.random.split(key, 3)
    own = linalg.randomized_svd(keys[0], kernel, k, **linalg.CLOSE)[1]

    def within(u: jax.Array, v: jax.Array) -> jax.Array:
        return _norm(linalg.dot(linalg.dot(u.mT, kernel), v))

    return Amplification(
        update=jnp.sqrt(jnp.sum(s**2, -1)),
        projected=within(u, vt.mT),
        own=jnp.sqrt(jnp.sum(own**2, -1)),
        random=within(_random(keys[1], u), _random(keys[2], vt.mT)),
        kernel=_norm(kernel),
    )


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x**2, (-2, -1)))


def _random(key: jax.Array, like: jax.Array) -> jax.Array:
    """Random orthonormal directions in the shape of `like`."""
    return linalg.orthonormal(jax.random.normal(key, like.shape))
