"""Preference losses, on the log-probabilities of whole completions.

A prompt x has a chosen completion y+ and a rejected completion y-, of |y| tokens; r is
the log-ratio of the policy to the reference, the model before training:

    r(y) = log pi(y | x) - log pi_ref(y | x),    m(y) = log pi(y | x) / |y|

    DPO     -log s(beta (r+ - r-))
    IPO     (r+ / |y+| - r- / |y-| - 1 / (2 beta))^2
    ORPO    -m+ - beta log s(o+ - o-),    o = m - log(1 - exp m)
    SimPO   -log s(beta (m+ - m-) - gamma)
    KTO     1 - s(beta (r - z)) if y is desirable, else 1 - s(beta (z - r))

with the logistic function s. Nothing here knows about models or adapters: the log-
probabilities of tokens come from `token_log_probs`, and those of the reference from the
same parameters with the adapters off.

References:
  Rafailov et al., Direct Preference Optimization, arXiv:2305.18290.
  Azar et al., A General Theoretical Paradigm (IPO), arXiv:2310.12036.
  Hong, Lee, Thorne, ORPO, arXiv:2403.07691.
  Meng, Xia, Chen, SimPO, arXiv:2405.14734.
  Ethayarajh et al., KTO, arXiv:2402.01306.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid


class Completions(NamedTuple):
    """Log-probabilities of completions.

    Attributes:
      total: `[rows]`, the sum over the tokens of each.
      tokens: `[rows]`, the number of tokens of each.
    """

    total: jax.Array
    tokens: jax.Array

    @property
    def mean(self) -> jax.Array:
        """`[rows]`, the mean per token; 0 where there are none."""
        return self.total / jnp.maximum(self.tokens, 1)

    def over(self, reference: Completions) -> Completions:
        """The log-ratios to a reference, which has no gradient."""
        return Completions(self.total - stop_gradient(reference.total), self.tokens)


class Pair(NamedTuple):
    """Two completions of every prompt.

    Attributes:
      chosen: the preferred completions.
      rejected: the others.
    """

    chosen: Completions
    rejected: Completions

    def over(self, reference: Pair) -> Pair:
        """The log-ratios to a reference."""
        return Pair(
            self.chosen.over(reference.chosen), self.rejected.over(reference.rejected)
        )


class Preference(NamedTuple):
    """Losses and implied rewards of pairs.

    Attributes:
      loss: `[rows]`.
      chosen: `[rows]`, the rewards of the chosen completions; they have no gradient.
      rejected: `[rows]`, those of the rejected completions.
    """

    loss: jax.Array
    chosen: jax.Array
    rejected: jax.Array

    @property
    def margin(self) -> jax.Array:
        """`[rows]`, by how much the chosen reward exceeds the rejected one."""
        return self.chosen - self.rejected


def completions(log_probs: jax.Array, weights: jax.Array) -> Completions:
    """Adds up the log-probabilities of tokens, completion by completion.

    Args:
      log_probs: `[*rows, time]`, as `token_log_probs` returns them.
      weights: `[*rows, time]`, 1 for the tokens of the completion, else 0.

    Returns:
      The sums `[*rows]`.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> found = completions(jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[1, 1, 0]]))
      >>> found.total.tolist(), found.mean.tolist()
      ([-3.0], [-1.5])
    """
    if log_probs.shape != weights.shape:
        raise ValueError(
            f"log_probs has shape {log_probs.shape} and weights {weights.shape}; give "
            "every token one weight"
        )
    total = jnp.sum(jnp.where(weights > 0, weights * log_probs, 0), axis=-1)
    return Completions(total, jnp.sum(weights, axis=-1, dtype=total.dtype))


def dpo(
    policy: Pair, reference: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Preference:
    """Direct preference optimisation.

        loss = -(1 - e) log s(beta (r+ - r-)) - e log s(beta (r- - r+))

    Args:
      policy: log-probabilities of the model that trains.
      reference: log-probabilities of the model before training.
      beta: cost of departing from the reference (paper and TRL: 0.1).
      label_smoothing: e, the share of pairs assumed to be the wrong way round: cDPO,
        as in the authors' code (0). TRL 1.16 has it in `CPOTrainer` only; its
        `loss_type="robust"` is another loss.

    Returns:
      Losses, and rewards beta r. At the start every loss is log 2 and every reward 0.

    Raises:
      ValueError: options are out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> same = Completions(jnp.array([-5.0]), jnp.array([4.0]))
      >>> found = dpo(Pair(same, same), Pair(same, same))
      >>> round(float(found.loss[0]), 4), float(found.margin[0])
      (0.6931, 0.0)

    References:
      Rafailov et al., arXiv:2305.18290, equation 7.
    """
    _positive(beta=beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}; it must be in [0, 0.5)")
    ratio = policy.over(reference)
    logits = beta * (ratio.chosen.total - ratio.rejected.total)
    loss = -(1 - label_smoothing) * log_sigmoid(logits)
    if label_smoothing:
        loss -= label_smoothing * log_sigmoid(-logits)
    return _rewarded(loss, beta, ratio.chosen.total, ratio.rejected.total)


def ipo(
    policy: Pair, reference: Pair, *, beta: float = 0.1, average: bool = True
) -> Preference:
    """Identity preference optimisation: a squared loss that bounds the margin.

        loss = (h - 1 / (2 beta))^2,    h = r+ / |y+| - r- / |y-|

    Args:
      policy: log-probabilities of the model that trains.
      reference: log-probabilities of the model before training.
      beta: the paper's tau; h is drawn to 1 / (2 tau) (paper and TRL: 0.1).
      average: divide log-ratios by lengths, as TRL does and the method's authors
        confirmed; False: h = r+ - r-, as printed in the paper.

    Returns:
      Losses, and rewards beta r of whole completions, as TRL reports them.

    Raises:
      ValueError: `beta` is not positive.

    References:
      Azar et al., arXiv:2310.12036, equation 17.
    """
    _positive(beta=beta)
    ratio = policy.over(reference)
    chosen, rejected = (x.mean if average else x.total for x in ratio)
    loss = jnp.square(chosen - rejected - 1 / (2 * beta))
    return _rewarded(loss, beta, ratio.chosen.total, ratio.rejected.total)


def orpo(
    policy: Pair, nll: jax.Array | None = None, *, beta: float = 0.1
) -> Preference:
    """Odds ratio preference optimisation: likelihood and preference, no reference.

        loss = nll - beta log s(o+ - o-),    o = log(exp m / (1 - exp m))

    Args:
      policy: log-probabilities of the model that trains.
      nll: `[rows]` or `[]`, of the chosen sequences; None: -m+, of their completions.
        TRL takes the mean over all tokens of the batch, prompts included.
      beta: the paper's lambda (TRL: 0.1; the paper's values differ by model).

    Returns:
      Losses, and rewards beta m, as TRL reports them.

    Raises:
      ValueError: `beta` is not positive.

    References:
      Hong, Lee, Thorne, arXiv:2403.07691, equations 6 and 7.
    """
    _positive(beta=beta)
    chosen, rejected = policy.chosen.mean, policy.rejected.mean
    logits = _log_odds(chosen) - _log_odds(rejected)
    loss = (-chosen if nll is None else nll) - beta * log_sigmoid(logits)
    return _rewarded(loss, beta, chosen, rejected)


def simpo(policy: Pair, *, beta: float = 2.0, gamma: float = 0.5) -> Preference:
    """Simple preference optimisation: rewards per token, a margin, no reference.

        loss = -log s(beta (m+ - m-) - gamma)

    Args:
      policy: log-probabilities of the model that trains.
      beta: scale of the reward (the authors' code: 2.0; TRL's `CPOTrainer`: 0.1).
      gamma: target margin (the authors' code: beta / 4; TRL: 0.5).

    Returns:
      Losses, and rewards beta m.

    Raises:
      ValueError: `beta` is not positive, or `gamma` is negative.

    References:
      Meng, Xia, Chen, arXiv:2405.14734, equation 6.
    """
    _positive(beta=beta)
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma}; it must be at least 0")
    chosen, rejected = policy.chosen.mean, policy.rejected.mean
    loss = -log_sigmoid(beta * (chosen - rejected) - gamma)
    return _rewarded(loss, beta, chosen, rejected)


def kto_baseline(
    policy: Completions, reference: Completions, weights: jax.Array | None = None
) -> jax.Array:
    """KTO's z: how far the policy is from the reference, on mismatched pairs.

        z = max(0, mean r(y'))

    for completions y' of other prompts: an estimate of KL(pi | pi_ref) without a
    gradient.

    Args:
      policy: log-probabilities of completions paired with other prompts.
      reference: likewise, of the model before training.
      weights: `[rows]`, 0 for rows that do not count; None: all do.

    Returns:
      `[]`.

    References:
      Ethayarajh et al., arXiv:2402.01306, section 4.1.
    """
    ratio = policy.over(reference).total
    weights = jnp.ones_like(ratio) if weights is None else weights
    mean = jnp.sum(weights * ratio) / jnp.maximum(jnp.sum(weights), 1)
    return stop_gradient(jnp.maximum(mean, 0))


def kto(
    policy: Completions,
    reference: Completions,
    desirable: jax.Array,
    baseline: jax.Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Kahneman-Tversky optimisation: completions judged one by one, not in pairs.

        loss = w+ (1 - s(beta (r - z)))    if desirable
               w- (1 - s(beta (z - r)))    else

    Args:
      policy: log-probabilities of the model that trains.
      reference: log-probabilities of the model before training.
      desirable: bool `[rows]`.
      baseline: z, from `kto_baseline`.
      beta: cost of departing from the reference (paper and TRL: 0.1).
      desirable_weight: w+ (TRL: 1). In the paper, w+ times the number of desirable
        rows should be 1 to 4/3 times w- times the number of the others.
      undesirable_weight: w- (TRL: 1).

    Returns:
      Losses `[rows]`, and rewards beta r, which have no gradient.

    Raises:
      ValueError: options are out of range.

    References:
      Ethayarajh et al., arXiv:2402.01306, equations 7 and 8.
    """
    _positive(
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    ratio = policy.over(reference).total
    sign = jnp.where(desirable, 1, -1)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    loss = weight * jax.nn.sigmoid(-sign * beta * (ratio - baseline))
    return loss, stop_gradient(beta * ratio)


def _rewarded(
    loss: jax.Array, beta: float, chosen: jax.Array, rejected: jax.Array
) -> Preference:
    return Preference(loss, *stop_gradient((beta * chosen, beta * rejected)))


def _log_odds(log_p: jax.Array) -> jax.Array:
    """log(p / (1 - p)), kept finite where p rounds to 1."""
    log_p = jnp.minimum(log_p, -jnp.finfo(log_p.dtype).eps)
    return log_p - jnp.log(-jnp.expm1(log_p))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value}; it must be above 0")
