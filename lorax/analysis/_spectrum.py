"""The spectrum of an update, from its factors: how much of its rank is used.

    s a b = U diag(sigma) V^T,        from QR of both factors and a rank x rank core

    effective rank   exp(-sum_i p_i log p_i),   p_i = sigma_i / sum_j sigma_j
    stable rank      sum_i sigma_i^2 / sigma_1^2
    energy of i      sum_{j <= i} sigma_j^2 / sum_j sigma_j^2

References:
  Roy & Vetterli, The Effective Rank: A Measure of Effective Dimensionality, EUSIPCO
  2007. Rudelson & Vershynin, Sampling from Large Matrices, arXiv:math/0503442 (stable
  rank).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lorax import linalg
from lorax.analysis import _thin
from lorax.types import Adapters


def singular_values(adapters: Adapters) -> dict[str, jax.Array]:
    """Returns the singular values of every update `scale * a @ b`, by path.

    For a Dora, they belong to the change of its directions, before the magnitude;
    `Full` leaves have no factors and are left out. After an init that moved a part of
    the kernel into the adapter (PiSSA, LoRA-GA), the factors contain that part:
    `lorax.compose.to_lora(trained, initial)` removes it.

    Args:
      adapters: `{path: Adapter}`.

    Returns:
      `{path: [*stack, k]}`, descending, at least float32, with `k = min(rank, in,
      out)`; the stack is of layers, experts or whatever batch axes the factors have.

    Raises:
      ValueError: no adapter has factors.

    Example:
      >>> import lorax
      >>> a, b = jnp.array([[3.0], [4.0]]), jnp.array([[0.0, 2.0]])
      >>> lora = lorax.Lora(a, b, 0.5, lorax.Axes((0,), (1,)))
      >>> singular_values({"w": lora})["w"].round(3).tolist()
      [5.0]
    """
    chosen = _thin.chosen(adapters, "singular_values")
    return {
        path: linalg.low_rank_svd(*_thin.product(a))[1] for path, a in chosen.items()
    }


def effective_rank(values: jax.Array) -> jax.Array:
    """Returns exp of the singular values' entropy, between 1 and their number.

    Args:
      values: `[..., k]`, as `singular_values` returns them.

    Returns:
      `[...]`; 0 if all values are 0.

    Example:
      >>> effective_rank(jnp.array([2.0, 2.0, 0.0])).round(4).item()
      2.0
    """
    total = values.sum(-1, keepdims=True)
    p = values / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), -1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)


def stable_rank(values: jax.Array) -> jax.Array:
    """Returns the squared Frobenius norm over the squared spectral norm.

    Args:
      values: `[..., k]`, descending.

    Returns:
      `[...]`; 0 if all values are 0.

    Example:
      >>> stable_rank(jnp.array([2.0, 1.0])).item()
      1.25
    """
    relative = _relative(values)
    return jnp.sum(relative**2, -1)


def energy(values: jax.Array) -> jax.Array:
    """Returns the i largest values' share of the squared Frobenius norm, for every i.

    Args:
      values: `[..., k]`, descending.

    Returns:
      `[..., k]`, rising to 1; all 0 if all values are 0.

    Example:
      >>> energy(jnp.array([2.0, 1.0, 0.0])).tolist()
      [0.800000011920929, 1.0, 1.0]
    """
    sums = jnp.cumsum(_relative(values) ** 2, -1)
    return sums / jnp.where(sums[..., -1:] > 0, sums[..., -1:], 1.0)


def metrics(adapters: Adapters) -> dict[str, jax.Array]:
    """Returns four scalars to monitor during training; works under `jit`.

    Args:
      adapters: `{path: Adapter}`.

    Returns:
      "update_norm": the Frobenius norm of all updates together; "spectral_norm": the
      largest singular value of any update; "effective_rank" and "stable_rank": the mean
      over all matrices, counting 0 for those that are still zero.

    Raises:
      ValueError: no adapter has factors.
    """
    found = list(singular_values(adapters).values())

    def mean(measure: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jnp.concatenate([measure(v).reshape(-1) for v in found]).mean()

    squares = jnp.stack([jnp.sum(values**2) for values in found])
    return {
        "update_norm": jnp.sqrt(squares.sum()),
        "spectral_norm": jnp.stack([values.max() for values in found]).max(),
        "effective_rank": mean(effective_rank),
        "stable_rank": mean(stable_rank),
    }


def _relative(values: jax.Array) -> jax.Array:
    """The values over the largest, so that squares stay in the range of float32."""
    largest = values.max(-1, keepdims=True)
    return values / jnp.where(largest > 0, largest, 1.0)
