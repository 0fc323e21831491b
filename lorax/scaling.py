"""Learning-rate laws: what to do with a tuned rate when something else changes.

Every law is a ratio, `lr(new) = lr(old) * f(new) / f(old)`: the constant in front is
what was tuned, at a known batch size or rank, with everything else held fixed. Batch
sizes and noise scales are in the same unit, examples or tokens.

References:
  McCandlish et al., An Empirical Model of Large-Batch Training, arXiv:1812.06162.
  Li et al., Surge Phenomenon in Optimal Learning Rate and Batch Size Scaling,
  arXiv:2405.14578. Su, articles 10542 (batch size) and 10563 (Adam's epsilon) of
  kexue.fm. Hayou et al., LoRA+, arXiv:2402.12354. Kalajdzievski, A Rank Stabilization
  Scaling Factor for Fine-Tuning with LoRA, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

BatchRule = Literal["sqrt", "linear", "sgd", "surge", "mean_field"]
Scaling = Literal["standard", "rank_stabilized"]
Number = Any
"""A Python number or a scalar array, traced or not."""

LORA_PLUS_RANGE = 1.0, 64.0  # where the width rule for its ratio is trusted
BATCH_RULES = ("sqrt", "linear", "sgd", "surge", "mean_field")


def learning_rate_for_batch(
    lr: Number,
    batch: Number,
    new_batch: Number,
    rule: BatchRule = "sqrt",
    *,
    noise_scale: Number | None = None,
    beta_n: Number = math.inf,
) -> Number:
    """Returns the rate for another batch size, of a rate tuned at `batch`.

    With B the batch size and N the noise scale, the rate is proportional to

        linear      B                          SGD, B << N
        sqrt        sqrt(B)                    Adam, Muon: sign-like steps, B small
        sgd         1 / (1 + N / B)            SGD at any B; N = tr(Sigma H) / g.Hg
        surge       2 / (sqrt(N/B) + sqrt(B/N))     sign-like steps; falls beyond N
        mean_field  2 / (beta_n / beta + beta / beta_n),
                    beta = (1 + pi N / 2B)^(-1/2)

    "surge" is the small-B limit of "mean_field", for B << pi sigma_i^2 / 2 g_i^2 alone:
    it goes to zero at large B, where the optimum settles. In "mean_field" N stands for
    kappa^2, the mean of (sigma_i / g_i)^2 over parameters; the simple noise scale is a
    loose estimate of it. Its rate peaks at B = pi N beta_n^2 / (2 (1 - beta_n^2)) if
    beta_n < 1 and rises throughout otherwise. As N grows "sgd" becomes "linear" and the
    other two "sqrt". The infinite beta_n of a diagonal Hessian leaves `beta` itself,
    the square root that saturates.

    All are for one step of a quadratic loss from the same point. Adapters have the
    noise scale of their own factors' gradients, and tolerate large batches less than
    full fine-tuning does.

    Args:
      lr: the rate tuned at `batch`.
      batch: its batch size.
      new_batch: the batch size wanted.
      rule: which law; "sqrt" because adapters are trained by Adam.
      noise_scale: N, needed by the last three rules and read by no other;
        `lorax.optim.noise_scale` measures the simple one, with H the identity.
      beta_n: for "mean_field", sqrt(sum H_ii / sum_{i != j} sign(g_i g_j) H_ij); inf,
        the default, for a diagonal H.

    Returns:
      The rate; a float where all arguments are.

    Raises:
      ValueError: another rule, a noise scale that is missing, or a number that is not
        positive.

    Example:
      >>> learning_rate_for_batch(2e-4, 16, 64)
      0.0004
      >>> learning_rate_for_batch(0.1, 8, 24, "sgd", noise_scale=24)  # 1/4 to 1/2
      0.2
    """
    _check(rule, noise_scale, lr=lr, batch=batch, new_batch=new_batch, beta_n=beta_n)
    shape = lambda b: _shape(b, rule, noise_scale, beta_n)
    return lr * (shape(new_batch) / shape(batch))


def batch_for_learning_rate(
    lr: float,
    batch: float,
    new_lr: float,
    rule: BatchRule = "sqrt",
    *,
    noise_scale: float | None = None,
    beta_n: float = math.inf,
) -> float:
    """Returns the batch size for another rate: `learning_rate_for_batch` inverted.

    "surge", and "mean_field" with beta_n < 1, have a peak, and below it two batch sizes
    with the same rate: the smaller one is returned, on the rising side, which takes
    fewer examples for the same step.

    Args:
      lr: the rate tuned at `batch`.
      batch: its batch size.
      new_lr: the rate wanted.
      rule: as there.
      noise_scale: as there.
      beta_n: as there.

    Returns:
      The batch size, not rounded.

    Raises:
      ValueError: no batch size has this rate, which the message bounds; or as there.

    Example:
      >>> batch_for_learning_rate(2e-4, 16, 4e-4)
      64.0
      >>> batch_for_learning_rate(0.1, 8, 0.2, "sgd", noise_scale=24)
      24.0
    """
    _check(rule, noise_scale, lr=lr, batch=batch, new_lr=new_lr, beta_n=beta_n)
    start = _shape(batch, rule, noise_scale, beta_n)
    wanted = start * (new_lr / lr)
    if rule in ("linear", "sqrt"):
        return float(wanted if rule == "linear" else wanted**2)
    assert noise_scale is not None
    bound = _supremum(rule, noise_scale, beta_n)
    reached = rule == "surge" or (rule == "mean_field" and beta_n < 1)
    if wanted > bound or (wanted == bound and not reached):
        raise ValueError(
            f"no batch size has new_lr={new_lr} by rule={rule!r}: with noise_scale="
            f"{noise_scale} the rate stays "
            f"{'at most' if reached else 'below'} {lr * bound / start:.4g}"
        )
    if rule == "sgd":
        return float(wanted / (1 - wanted / noise_scale))
    if rule == "surge":
        return float(_smaller_root(wanted, noise_scale) ** 2)
    kappa = math.pi * noise_scale / 2
    x = _smaller_root(wanted, kappa * beta_n**2)
    return float(1 / (x**-2 - 1 / kappa))


def _smaller_root(y: float, c: float) -> float:
    """The smaller x with x / (1 + x^2 / c) = y, without cancellation."""
    return 2 * y / (1 + math.sqrt(max(1 - 4 * y**2 / c, 0.0)))


def _shape(batch: Number, rule: str, noise_scale: Number, beta_n: Number) -> Number:
    """The law up to a constant that leaves infinite scales their limits."""
    if rule == "linear":
        return batch
    if rule == "sqrt":
        return batch**0.5
    if rule == "sgd":
        return batch / (1 + batch / noise_scale)
    if rule == "surge":
        return batch**0.5 / (1 + batch / noise_scale)
    kappa = math.pi * noise_scale / 2
    x = (1 / kappa + 1 / batch) ** -0.5  # beta sqrt(kappa)
    return x / (1 + x**2 / (kappa * beta_n**2))


def _supremum(rule: str, noise_scale: float, beta_n: float) -> float:
    """The least upper bound of `_shape` over batch sizes."""
    if rule == "sgd":
        return noise_scale
    if rule == "surge":
        return noise_scale**0.5 / 2
    root = math.sqrt(math.pi * noise_scale / 2)
    return root * (beta_n / 2 if beta_n < 1 else 1 / (1 + beta_n**-2))


def adam_epsilon_for_batch(eps: Number, batch: Number, new_batch: Number) -> Number:
    """Returns Adam's epsilon for another batch size: eps / sqrt(new_batch / batch).

    While noise dominates the gradient, sqrt(v) ~ sigma / sqrt(B), so this keeps epsilon
    at the same fraction of it: the rule that goes with the square-root law for the rate
    (and 1 - beta ~ B for the decays). Valid for B below the noise scale; beyond it
    sqrt(v) no longer falls.

    Args:
      eps: epsilon at `batch`; it may be 0.
      batch: its batch size.
      new_batch: the batch size wanted.

    Raises:
      ValueError: a batch size that is not positive.

    Example:
      >>> adam_epsilon_for_batch(1e-8, 16, 64)
      5e-09
    """
    _require_positive(batch=batch, new_batch=new_batch)
    return eps / (new_batch / batch) ** 0.5


def softsign(x: jax.Array, eps: Number) -> jax.Array:
    """Returns x / sqrt(x^2 + eps^2), Adam's step on a constant gradient x.

    Example:
      >>> softsign(jnp.array([3.0, -4e-8]), 4.0)
      Array([ 6.e-01, -1.e-08], dtype=float32)
    """
    x = jnp.asarray(x)
    return x / jnp.hypot(x, eps)


def adam_epsilon_shrinkage(
    gradient: jax.Array, sigma: jax.Array, batch: Number, eps: Number
) -> jax.Array:
    """Returns beta, by which noise shrinks the mean step: E[step_i] ~ nu_i beta.

        nu_i = softsign(g_i, eps),    kappa^2 = mean_i sigma_i^2 / (g_i^2 + eps^2)
        beta = (1 + pi kappa^2 / 2B)^(-1/2)

    A mean-field form, with one kappa for all parameters. Where their signal-to-noise
    ratios are alike it is within 14 % of Monte-Carlo; where not, and eps is small, the
    smallest g_i rule kappa, and beta at small B is too low by a factor.

    Args:
      gradient: g `[n]`, the mean over examples.
      sigma: `[n]`, the standard deviation over examples.
      batch: B.
      eps: epsilon of the optimiser, above 0.

    Raises:
      ValueError: a batch size or epsilon that is not positive.

    Example:
      >>> g, sigma = jnp.array([0.3]), jnp.array([1.0])
      >>> beta = adam_epsilon_shrinkage(g, sigma, batch=2 * jnp.pi, eps=0.4)
      >>> round(float(beta**2), 6)  # kappa^2 = 4
      0.5
    """
    _require_positive(batch=batch, eps=eps)
    return (1 + _noise(gradient, sigma, batch, eps)) ** -0.5


def adam_epsilon_learning_rate(
    gradient: jax.Array,
    sigma: jax.Array,
    hessian: jax.Array,
    batch: Number,
    eps: Number,
) -> jax.Array:
    """Returns the best rate for one step of Adam with this epsilon, beta1 = beta2 = 0.

        eta* = beta sum_i nu_i g_i / (beta^2 sum_ij nu_i nu_j H_ij + (1 - beta^2) tr H)

    with nu and beta of `adam_epsilon_shrinkage`. The rate has a peak over the batch
    size (the surge) only if sum_ij nu_i nu_j H_ij > 2 tr H, at beta^2 = tr H /
    (sum_ij nu_i nu_j H_ij - tr H); a larger epsilon makes it rarer. As eps -> inf the
    step is SGD's at the rate eta* / eps, the noise in it overrated by pi / 2: then, and
    where eps is about the noise, eta* is up to 36 % low at small B.

    For adapters: the gradient of `a` is proportional to b, so early on it can lie below
    epsilon, and a then trains as under slow SGD while b steps by signs. Keep epsilon at
    1e-8 or below in float32 and scale the loss up rather than raise it.

    Args:
      gradient: g `[n]`.
      sigma: `[n]`.
      hessian: H `[n, n]`.
      batch: B.
      eps: epsilon, above 0.

    Raises:
      ValueError: a batch size or epsilon that is not positive.

    Example:
      >>> g, sigma, H = jnp.array([0.3]), jnp.array([0.0]), jnp.array([[2.0]])
      >>> rate = adam_epsilon_learning_rate(g, sigma, H, batch=1, eps=0.4)
      >>> round(float(rate * softsign(g, 0.4)[0] * 2), 6)  # Newton's step, g / H
      0.3
    """
    beta = adam_epsilon_shrinkage(gradient, sigma, batch, eps)
    nu, hessian = softsign(gradient, eps), jnp.asarray(hessian)
    curved = jnp.vdot(nu, jnp.matmul(hessian, nu, precision=jax.lax.Precision.HIGHEST))
    # 1 - beta^2 = beta^2 noise, which cancels nothing where the noise is small
    noisy = _noise(gradient, sigma, batch, eps) * jnp.trace(hessian)
    return jnp.vdot(nu, gradient) / (beta * (curved + noisy))


def _noise(gradient: Any, sigma: Any, batch: Number, eps: Number) -> jax.Array:
    """The quantity pi kappa^2 / 2B."""
    kappa = jnp.asarray(sigma) / jnp.hypot(jnp.asarray(gradient), eps)
    return math.pi * jnp.mean(kappa**2) / (2 * batch)


def lora_plus_ratio(in_: int, out: int, rank: int) -> float:
    """Returns LoRA+'s ratio of the rates of b and a for one kernel, from its widths.

        clip(n / sqrt(m r), 1, 64)

    From equal contributions of a and b to the loss, under sign-like updates, with the
    stationary scales std a ~ 1 / sqrt(n), std b ~ 1 / sqrt(r) and gradients that are
    independent over the kernel. For square kernels it is sqrt(n / r), 16 at n = 2048
    and r = 8, which is also the fixed ratio commonly used.

    Args:
      in_: n, the product of the kernel's in axes.
      out: m, of its out axes.
      rank: r.

    Raises:
      ValueError: a size that is not positive.

    Example:
      >>> lora_plus_ratio(2048, 2048, 8)
      16.0
      >>> lora_plus_ratio(64, 4096, 16)
      1.0
    """
    _require_positive(in_=in_, out=out, rank=rank)
    low, high = LORA_PLUS_RANGE
    return min(max(in_ / math.sqrt(out * rank), low), high)


def learning_rate_for_rank(
    lr: Number,
    rank: int,
    new_rank: int,
    scaling: Scaling = "standard",
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
) -> Number:
    """Returns the rate for another rank, alpha and everything else held fixed.

    At b = 0 only b moves. With G the kernel's gradient and s the scale its gradient is
    s a^T G, so the first step lowers the loss by

        adam  lr s   sum_kj |(a^T G)_kj|      ~ lr s r
        sgd   lr s^2 sum_kj  (a^T G)_kj ^2    ~ lr s^2 r

    the r rows of a^T G being alike, since the columns of a are drawn alike whatever the
    rank. Holding that constant, with s = alpha / r or alpha / sqrt(r):

                standard                rank_stabilized
        adam    lr                      lr sqrt(rank / new_rank)
        sgd     lr new_rank / rank      lr

    The last entry is rsLoRA's own argument. Valid for the standard init, early in
    training, and ranks well below min(in, out); the curvature along the step is taken
    not to depend on the rank.

    Args:
      lr: the rate tuned at `rank`.
      rank: the rank it was tuned at.
      new_rank: the rank wanted.
      scaling: as in `lorax.Target`.
      optimizer: "adam" for any optimiser with sign-like steps; "sgd".

    Raises:
      ValueError: another scaling or optimiser, or a number that is not positive.

    Example:
      >>> learning_rate_for_rank(2e-4, 8, 32)
      0.0002
      >>> learning_rate_for_rank(2e-4, 8, 32, "rank_stabilized")
      0.0001
    """
    exponents = {"standard": -1.0, "rank_stabilized": -0.5}  # of r in s
    powers = {"adam": 1, "sgd": 2}  # of s in the first step
    _one_of("scaling", scaling, tuple(exponents))
    _one_of("optimizer", optimizer, tuple(powers))
    _require_positive(lr=lr, rank=rank, new_rank=new_rank)
    return lr * (rank / new_rank) ** (1 + powers[optimizer] * exponents[scaling])


def _check(rule: str, noise_scale: Number | None, **numbers: Number) -> None:
    _one_of("rule", rule, BATCH_RULES)
    if rule in ("sgd", "surge", "mean_field"):
        if noise_scale is None:
            raise ValueError(
                f"rule={rule!r} needs noise_scale; lorax.optim.track_noise_scale "
                "measures one while training"
            )
        numbers["noise_scale"] = noise_scale
    _require_positive(**numbers)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}; choose one of {', '.join(known)}")


def _require_positive(**numbers: Number) -> None:
    """Raises ValueError for what is not positive, where it can be seen."""
    for name, value in numbers.items():
        if not isinstance(value, jax.core.Tracer) and not value > 0:
            raise ValueError(f"{name}={value}; give a number > 0")
