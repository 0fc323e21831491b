"""Adam's epsilon and gradient noise: the expected effect of one step.

Without memory (beta1 = beta2 = 0), the step u on a batch's gradient x is, for each
parameter,

    u = x / sqrt(x^2 + eps^2),    x = g + t z,    z ~ N(0, 1),    t^2 = sigma^2 / B

Both moments of u are exact integrals over one variable. For any a,

    a / sqrt(a^2 + 1) = int_0^inf e^-v erf(a sqrt(v)) dv
    1 / (a^2 + 1)     = int_0^inf e^-v e^(-a^2 v) dv

and with a = x / eps the mean over z moves inside, with r(v)^2 = eps^2 + 2 v t^2:

    E[u]   = int_0^inf e^-v erf(g sqrt(v) / r) dv
    E[u^2] = 1 - int_0^inf e^-v (eps / r) e^(-v g^2 / r^2) dv

    eps -> 0     E[u] = erf(g / (sqrt(2) t)),    E[u^2] = 1           sign descent
    t -> 0       E[u] = softsign(g, eps),        E[u^2] = E[u]^2      no noise
    eps -> inf   E[u] = g / eps,     E[u^2] = (g^2 + t^2) / eps^2     SGD

Closed forms with the same three limits, except for the shape of erf, are

    E[u]   ~ g / sqrt(g^2 + eps^2 + pi t^2 / 2)
    E[u^2] ~ (g^2 + t^2) / (g^2 + t^2 + eps^2)

References:
  Su, kexue.fm 10563, the source of the question and of the closed form of E[u]; it
  represents the noise of all parameters by one average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf

from lorax import _checks, linalg
from lorax._checks import Number

# The trapezoidal rule in log v for int_0^inf e^-v f(v) dv: 40 nodes give both moments
# to 5e-7 over t / g from 1e-3 to 1e2 and eps / g from 1e-6 to 1e2.
NODES = np.exp(np.linspace(-16, 3.5, 40))
WEIGHTS = NODES * np.exp(-NODES) / np.sum(NODES * np.exp(-NODES))
CERTAIN = 6.0  # erf(6) = 1, exp(-36) = 0: a step without noise or epsilon


def adam_epsilon_for_batch(eps: Number, batch: Number, new_batch: Number) -> Number:
    """Returns Adam's epsilon for a new batch size: eps / sqrt(new_batch / batch).

    While noise dominates the gradient, sqrt(v) ~ sigma / sqrt(B), so this keeps epsilon
    at the same fraction of it. The rule goes with the square-root law for the learning
    rate (and 1 - beta ~ B for the decay rates). It is valid for B below the noise
    scale, beyond which sqrt(v) no longer falls.

    Args:
      eps: epsilon at `batch`; may be 0.
      batch: the batch size at which eps was tuned.
      new_batch: the new batch size.

    Raises:
      ValueError: a batch size that is not positive, a negative epsilon.

    Example:
      >>> adam_epsilon_for_batch(1e-8, 16, 64)
      5e-09
    """
    _checks.all_positive(batch=batch, new_batch=new_batch)
    _checks.at_least("eps", eps, infinite=True)
    return eps / (new_batch / batch) ** 0.5


def softsign(x: jax.Array, eps: Number) -> jax.Array:
    """Returns x / sqrt(x^2 + eps^2), Adam's step on a constant gradient x; 0 at x = 0.

    Example:
      >>> softsign(jnp.array([3.0, -4e-8]), 4.0)
      Array([ 6.e-01, -1.e-08], dtype=float32)
    """
    x = jnp.asarray(x)
    return x / jnp.where(x == 0, 1, jnp.hypot(x, eps))


def adam_epsilon_shrinkage(
    gradient: jax.Array, sigma: jax.Array, batch: Number, eps: Number
) -> jax.Array:
    """Returns beta, the factor by which noise shrinks mean steps: E[u_i] = beta_i nu_i.

        nu_i = softsign(g_i, eps),    E[u_i] = int_0^inf e^-v erf(g_i sqrt(v) / r_i) dv

    (see the module docstring). It is within 14 % of
    sqrt((g^2 + eps^2) / (g^2 + eps^2 + pi t^2 / 2)).

    Args:
      gradient: g, the mean over examples, of any shape.
      sigma: the standard deviation over examples, in the same shape.
      batch: B.
      eps: the optimiser's epsilon; at 0 the step is the sign.

    Returns:
      A factor in [0, 1] for each parameter; the limit where g is 0.

    Raises:
      ValueError: a batch size that is not positive, a negative epsilon.

    Example:
      >>> g, sigma = jnp.array([0.2, 2.0]), jnp.array([4.0, 4.0])
      >>> beta = adam_epsilon_shrinkage(g, sigma, batch=16, eps=0.0)
      >>> [round(float(b), 4) for b in beta]  # erf(g / (sqrt(2) t)), t = 1
      [0.1585, 0.9545]
    """
    g, t = _noisy(gradient, sigma, batch, eps)
    g = jnp.where(g == 0, 1e-6 * jnp.hypot(t, eps), g)  # beta is even and smooth at 0
    mean, _ = _moments(g, t, eps)
    nu = softsign(g, eps)
    # softsign is concave in |x|, so only rounding can exceed 1
    return jnp.minimum(jnp.where(nu == 0, 1, mean / jnp.where(nu == 0, 1, nu)), 1)


def adam_epsilon_learning_rate(
    gradient: jax.Array,
    sigma: jax.Array,
    hessian: jax.Array | Callable[[jax.Array], jax.Array],
    batch: Number,
    eps: Number,
    *,
    key: jax.Array | None = None,
    probes: int = 4,
) -> jax.Array:
    """Returns the best learning rate for a step of Adam with beta1 = beta2 = 0.

    After a step -eta u, the expected loss is L - eta E[u].g + eta^2 E[u.Hu] / 2. If the
    noise is independent between parameters, E[u_i u_j] = E[u_i] E[u_j] off the
    diagonal, so the minimum is at

        mu_i = E[u_i],    m_i = E[u_i^2]
        eta* = sum_i mu_i g_i / (sum_ij mu_i mu_j H_ij + sum_i H_ii (m_i - mu_i^2))

    with the moments of the module docstring, each parameter having its own
    signal-to-noise ratio. For a model, give H as a function: the second sum is then
    the mean of w.Hw over random signs z, with w_i = z_i sqrt(m_i - mu_i^2). The rate
    is exact for Gaussian noise; with the closed forms of the moments it would be right
    within a factor of 1.4. As eps -> inf, the step becomes SGD's, at the rate
    eta* / eps. At eps = 0 it is that of sign descent; there, if all ratios |g_i| / t_i
    are equal and s_i = sign g_i, the rate has a peak over the batch size (the surge)
    only if sum_ij s_i s_j H_ij > 2 tr H.

    The noise of a real model is not independent. For LoRA on a BERT of 22.7 million
    parameters the rate was right within 1.3 at batches above the noise scale, and 3 to
    17 times too high well below it; the ratio of the rates at two epsilons was right
    within 1.3 there, too (docs/results/claims/one_step/table.md).

    For adapters: the gradient of `a` is proportional to b, so early on it can be below
    epsilon, and a then trains as with slow SGD while b takes sign-like steps. Keep
    epsilon at 1e-8 or below in float32, and scale the loss up rather than raise
    epsilon.

    Args:
      gradient: g, the mean over examples, n entries in any shape.
      sigma: the standard deviation over examples, in the same shape.
      hessian: H `[n, n]`; for a diagonal H, its diagonal in the gradient's shape; or
        `v -> H v`, in the gradient's shape, such as `jax.jvp` of `jax.grad`.
      batch: B.
      eps: the optimiser's epsilon; at 0 the step is the sign.
      key: of the random signs; needed where `hessian` is a function.
      probes: draws of the signs; the function is called once for each, and once more.

    Returns:
      The learning rate, a scalar; 0 if every g_i is 0.

    Raises:
      ValueError: a batch size that is not positive, a negative epsilon, a Hessian of
        another shape, or a function without a key or probes.

    Example:
      >>> g, sigma, H = jnp.array([0.3]), jnp.array([0.0]), jnp.array([[2.0]])
      >>> rate = adam_epsilon_learning_rate(g, sigma, H, batch=1, eps=0.4)
      >>> round(float(rate * softsign(g, 0.4)[0] * 2), 6)  # Newton's step, g / H
      0.3
    """
    g, t = _noisy(gradient, sigma, batch, eps)
    mean, square = _moments(g, t, eps)
    slope = jnp.sum(mean * g)
    if callable(hessian):
        if key is None:
            raise ValueError(
                "hessian is a function, and its noise term is sampled: give "
                "key=jax.random.key(0)"
            )
        curved = _sampled(hessian, mean, square, key, probes)
    else:
        curved = _curvature(_wide(hessian), mean, square)
    return jnp.where(slope == 0, 0, slope / jnp.where(slope == 0, 1, curved))


def _curvature(hessian: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
    """E[u.Hu] from the moments of u, for a matrix or the diagonal of one."""
    n = mean.size
    if hessian.shape not in ((n, n), mean.shape):
        raise ValueError(
            f"hessian has shape {hessian.shape}; for a gradient of shape {mean.shape} "
            f"give {(n, n)}, or {mean.shape} for its diagonal"
        )
    if hessian.shape != (n, n):
        return jnp.sum(hessian * square)
    mean, square = mean.reshape(n), square.reshape(n)
    noise = jnp.maximum(square - mean**2, 0)  # >= 0 up to rounding
    bent = linalg.dot(hessian, mean)
    return jnp.sum(mean * bent) + jnp.sum(jnp.diagonal(hessian) * noise)


def _sampled(
    hessian: Callable[[jax.Array], jax.Array],
    mean: jax.Array,
    square: jax.Array,
    key: jax.Array,
    probes: int,
) -> jax.Array:
    """As `_curvature`, for a function; unbiased, and exact if H is diagonal."""
    _checks.at_least("probes", probes, 1)
    spread = jnp.sqrt(jnp.maximum(square - mean**2, 0))

    def bent(w: jax.Array) -> jax.Array:
        return jnp.sum(w * hessian(w))

    signs = (
        jax.random.rademacher(own, mean.shape, mean.dtype)
        for own in jax.random.split(key, probes)
    )
    noise = jnp.stack([bent(z * spread) for z in signs])
    return bent(mean) + jnp.mean(noise)


def _noisy(
    gradient: Any, sigma: Any, batch: Number, eps: Number
) -> tuple[jax.Array, jax.Array]:
    """The mean and standard deviation of a batch's gradient, broadcast together."""
    _checks.all_positive(batch=batch)
    _checks.at_least("eps", eps, infinite=True)
    g, t = jnp.broadcast_arrays(_wide(gradient), _wide(sigma))
    return g, t / jnp.sqrt(_wide(batch))


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(linalg.wide(x))


def _moments(g: jax.Array, t: jax.Array, eps: Number) -> tuple[jax.Array, jax.Array]:
    """E[u] and E[u^2] for every entry of g and t."""
    eps = _wide(eps)
    v, weights = (
        jnp.asarray(x, g.dtype).reshape(-1, *(1,) * g.ndim) for x in (NODES, WEIGHTS)
    )
    spread = jnp.sqrt(2 * v) * t  # [nodes, *shape]
    root = jnp.hypot(eps, spread)
    sure = CERTAIN * jnp.sign(g)
    z = jnp.where(root > 0, jnp.sqrt(v) * g / jnp.where(root > 0, root, 1), sure)
    own = spread / jnp.where(eps > 0, eps, 1)
    ratio = jnp.where(eps > 0, own, jnp.where(spread > 0, jnp.inf, 0))
    # 1 - (eps / r) exp(-z^2), without cancellation where eps is large
    square = -jnp.expm1(-(0.5 * jnp.log1p(ratio**2) + z**2))
    return jnp.sum(weights * erf(z), 0), jnp.sum(weights * square, 0)
