"""The learning rate for a new batch size, and the batch size for a new learning rate.

References:
  McCandlish et al., An Empirical Model of Large-Batch Training, arXiv:1812.06162.
  Li et al., Surge Phenomenon in Optimal Learning Rate and Batch Size Scaling,
  arXiv:2405.14578. Su, kexue.fm 10542.
"""

from __future__ import annotations

import math
from typing import Literal

from lorax import _checks
from lorax._checks import Number

BatchRule = Literal["sqrt", "linear", "sgd", "surge", "mean_field"]
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
    """Returns the learning rate for a new batch size, given one tuned at `batch`.

    With B the batch size and N the noise scale, the learning rate is proportional to

        linear      B                          SGD, B << N
        sqrt        sqrt(B)                    Adam, Muon: sign-like steps, B small
        sgd         1 / (1 + N / B)            SGD at any B; N = tr(Sigma H) / g.Hg
        surge       2 / (sqrt(N/B) + sqrt(B/N))     sign-like steps; falls beyond N
        mean_field  2 / (beta_n / beta + beta / beta_n),
                    beta = (1 + pi N / 2B)^(-1/2)

    "surge" is the small-B limit of "mean_field", valid only for
    B << pi sigma_i^2 / 2 g_i^2: at large B it goes to zero, while the true optimum
    levels off. In "mean_field", N stands for kappa^2, the mean of (sigma_i / g_i)^2
    over parameters, of which the simple noise scale is a rough estimate. If these
    ratios differ a lot, no average represents them:
    `adam_epsilon_learning_rate` with eps = 0 treats each separately. The mean-field
    rate peaks at B = pi N beta_n^2 / (2 (1 - beta_n^2)) if beta_n < 1, and otherwise
    rises throughout. As N grows, "sgd" becomes "linear" and the other two "sqrt". The
    infinite beta_n of a diagonal Hessian leaves `beta` itself, a saturating square
    root.

    All rules are for one step on a quadratic loss from the same point. For adapters,
    the noise scale is that of their factors' gradients, and they tolerate large batches
    less well than full fine-tuning does.

    Args:
      lr: the learning rate tuned at `batch`.
      batch: the batch size at which it was tuned.
      new_batch: the new batch size.
      rule: which law; "sqrt" by default, because adapters are usually trained by Adam.
      noise_scale: N, needed by the last three rules and ignored by the others;
        `lorax.optim.noise_scale` measures the simple one, with H the identity.
      beta_n: for "mean_field", sqrt(sum H_ii / sum_{i != j} sign(g_i g_j) H_ij); inf,
        the default, for a diagonal H.

    Returns:
      The learning rate; a float if all arguments are.

    Raises:
      ValueError: an unknown rule, a missing noise scale, or a number that is not
        positive.

    Example:
      >>> learning_rate_for_batch(2e-4, 16, 64)
      0.0004
      >>> learning_rate_for_batch(0.1, 8, 24, "sgd", noise_scale=24)  # 1/4 to 1/2
      0.2
    """
    _check(rule, noise_scale, lr=lr, batch=batch, new_batch=new_batch, beta_n=beta_n)
    after, before = (_shape(b, rule, noise_scale, beta_n) for b in (new_batch, batch))
    return lr * (after / before)


def batch_for_learning_rate(
    lr: float,
    batch: float,
    new_lr: float,
    rule: BatchRule = "sqrt",
    *,
    noise_scale: float | None = None,
    beta_n: float = math.inf,
) -> float:
    """Returns the batch size for a new rate: the inverse of `learning_rate_for_batch`.

    "surge", and "mean_field" with beta_n < 1, have a peak, below which two batch sizes
    have the same rate. The smaller one is returned, on the rising side: it needs fewer
    examples for the same step.

    Args:
      lr: the learning rate tuned at `batch`.
      batch: the batch size at which it was tuned.
      new_lr: the new learning rate.
      rule: as for `learning_rate_for_batch`.
      noise_scale: as for `learning_rate_for_batch`.
      beta_n: as for `learning_rate_for_batch`.

    Returns:
      The batch size, not rounded.

    Raises:
      ValueError: no batch size has this rate (the message gives the bound), or as for
        `learning_rate_for_batch`.

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
            f"no batch size has new_lr={new_lr} under rule={rule!r}: with noise_scale="
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
    """The law up to a constant, chosen so that infinite scales have limits."""
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


def _check(rule: str, noise_scale: Number | None, **numbers: Number) -> None:
    _checks.one_of("rule", rule, BATCH_RULES)
    if rule in ("sgd", "surge", "mean_field"):
        if noise_scale is None:
            raise ValueError(
                f"rule={rule!r} needs noise_scale; lorax.optim.track_noise_scale "
                "measures it during training"
            )
        numbers["noise_scale"] = noise_scale
    _checks.all_positive(**numbers)
