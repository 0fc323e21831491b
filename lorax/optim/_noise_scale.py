"""Tracks the gradient noise scale, which tells how large a batch pays off.

From the mean of |g_i|^2 over the microbatches of a step (B1 examples each) and |g|^2 of
their mean (B2 examples), unbiased estimates of the squared true gradient and of the
trace of the per-example covariance Sigma are

    |G|^2 = (B2 |g2|^2 - B1 |g1|^2) / (B2 - B1)
    S     = (|g1|^2 - |g2|^2) / (1 / B1 - 1 / B2)

and the simple noise scale is tr Sigma / |G|^2, in examples. Both are averaged over
steps separately, and divided only when read: in one test the ratio of means is 114.1
and the mean of ratios 179.9, where the truth is 113.7. An estimate of |G|^2 may be
negative; it is clamped when read, but not in the average.

References:
  McCandlish et al., An Empirical Model of Large-Batch Training, arXiv:1812.06162.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks
from lorax.optim import _states
from lorax.types import MicrobatchNorms


class NoiseScaleState(NamedTuple):
    """Two running averages from zero, without bias correction.

    Attributes:
      count: int32 []; steps measured.
      covariance: float32 []; average of S.
      gradient: float32 []; average of |G|^2.
    """

    count: jax.Array  # type: ignore[assignment]
    covariance: jax.Array
    gradient: jax.Array


def track_noise_scale(
    decay: float | jax.Array = 0.99,
) -> optax.GradientTransformationExtraArgs:
    """Measures the noise scale and passes the updates through unchanged.

    Its update needs `microbatch=MicrobatchNorms(...)`, as passed by a train step that
    accumulates. For adapters it measures the noise scale of the *factors'* gradients:
    while b is zero, only b's gradient counts. Read it again after a few hundred steps.

    Args:
      decay: decay rate of the two averages, in [0, 1). 0.99 averages over about the
        last hundred steps; a single step says little.

    Returns:
      An optax transformation; read its state with `noise_scale`.

    Raises:
      ValueError: a decay out of range; at `update`, no `microbatch`, or one whose
        second batch size is not larger than the first.

    Example:
      >>> tx = track_noise_scale()
      >>> norms = MicrobatchNorms(small=5.0, large=2.0, small_batch=2, large_batch=8)
      >>> grads = {"w": jnp.ones(3)}
      >>> _, state = tx.update(grads, tx.init(grads), microbatch=norms)
      >>> noise_scale(state)  # S = 3 / (1/2 - 1/8), |G|^2 = (16 - 10) / 6
      Array(8., dtype=float32)
    """
    _checks.average("decay", decay)

    def init_fn(params: Any) -> NoiseScaleState:
        del params
        return NoiseScaleState(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))

    def update_fn(
        updates: Any,
        state: NoiseScaleState,
        params: Any = None,
        *,
        microbatch: MicrobatchNorms | None = None,
        **extra: Any,
    ) -> tuple[Any, NoiseScaleState]:
        del params, extra
        covariance, gradient = _estimates(microbatch)

        def ema(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.asarray(decay * old + (1 - decay) * new, old.dtype)

        return updates, NoiseScaleState(
            optax.safe_increment(state.count),
            ema(state.covariance, covariance),
            ema(state.gradient, gradient),
        )

    return _states.transformation(init_fn, update_fn)


def noise_scale(opt_state: optax.OptState) -> jax.Array:
    """Returns tr Sigma / |G|^2 in examples, the ratio of the two averages.

    Args:
      opt_state: state of `track_noise_scale`, or of a transformation that contains it.

    Returns:
      float32 []; inf if the average of |G|^2 is not positive (the batch is far below
      the noise scale, or the average too short), NaN before the first step.

    Raises:
      ValueError: no `track_noise_scale` state, or several.
    """
    state = _states.find(opt_state, NoiseScaleState, "lorax.optim.track_noise_scale")
    covariance = jnp.maximum(state.covariance, 0)
    resolved = state.gradient > 0
    ratio = covariance / jnp.where(resolved, state.gradient, 1)
    return jnp.where(state.count == 0, jnp.nan, jnp.where(resolved, ratio, jnp.inf))


def _estimates(norms: MicrobatchNorms | None) -> tuple[jax.Array, jax.Array]:
    """S and |G|^2 of one step, in float32."""
    if norms is None:
        raise ValueError(
            "track_noise_scale needs gradient norms at two batch sizes: accumulate "
            ">= 2 microbatches per step, and pass microbatch=MicrobatchNorms(...) to "
            "tx.update"
        )
    known = not any(isinstance(size, jax.core.Tracer) for size in norms[2:])
    if known and not 0 < norms.small_batch < norms.large_batch:
        raise ValueError(
            f"small_batch={norms.small_batch} and large_batch={norms.large_batch}: the "
            "noise scale comes from their difference, so the second must be larger; "
            "accumulate >= 2 microbatches per step"
        )
    g1, g2, b1, b2 = (jnp.asarray(value, jnp.float32) for value in norms)
    return (g1 - g2) / (1 / b1 - 1 / b2), (b2 * g2 - b1 * g1) / (b2 - b1)
