"""Scaled gradient descent: preconditions each factor by the other's Gram matrix.

    gA <- gA (b b^T + d I)^-1,    gB <- (a^T a + d I)^-1 gB

This is the gradient in a Riemannian metric under which rescaling the factors,
`(a T, T^-1 b)`, changes nothing. The kernel then moves by s^2 (P_A G + G P_B): unlike
in LoRA-Pro, what both factors can express counts twice. d is relative to both factors,

    d = damping * max(tr a^T a, tr b b^T) / rank

while the released code and PEFT add a constant, tuned between 1e-7 and 100 per task.

References:
  Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models,
  arXiv:2402.02347.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax

from lorax import _checks
from lorax.optim import _decay, _gram, _pairs, _pairwise, _standard


class ScaleByGramState(NamedTuple):
    """Empty; its type tells `training.create_state` that it reads gradients."""

    @property
    def reads_gradients(self) -> str:
        """The name of the transform, for the error message."""
        return "scale_by_gram"


def scale_by_gram(
    damping: _checks.Number = 0.1, relative: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each factor's gradient by the other's inverse Gram matrix.

    Args:
      damping: relative to the larger trace of the two, at least 0. At 0 the
        pseudo-inverse is taken. 0.1 as for LoRA-Pro with Adam: while b is near zero, it
        bounds the step of a by the learning rate.
      relative: False adds `damping` as it is (1e-6 in the released code, 1e-2 in
        PEFT).

    Returns:
      An optax transformation without state; `update` needs the adapters, as `params`,
      and takes `pairs=` for a population member. Other leaves pass through.

    Raises:
      ValueError: negative damping; at `init`, an AdaLora; at `update`, no adapters.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> lora = Lora(2 * jnp.eye(2), jnp.eye(2), 1.0, Axes((0,), (1,)))
      >>> tx = scale_by_gram(damping=0.0)
      >>> updates, _ = tx.update({"w": lora}, tx.init({"w": lora}), {"w": lora})
      >>> updates["w"].b  # (4 I)^-1
      Array([[0.25, 0.  ],
             [0.  , 0.25]], dtype=float32)
    """
    _checks.at_least("damping", damping)

    def scaled(update: _pairs.Pair, given: _pairs.Pair) -> tuple[jax.Array, jax.Array]:
        n, m = _gram.spectra(given, damping, relative)
        a = _gram.solve(m, update.a.mT).mT
        b = _gram.solve(n, update.b)
        return _gram.true_rank_only(a, b, given.rank)

    return _pairwise.stateless("scale_by_gram", scaled, ScaleByGramState())


def riemannian(
    learning_rate: _checks.NumberOrSchedule,
    damping: _checks.Number = 0.1,
    relative: bool = True,
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    weight_decay: _checks.NumberOrSchedule = 0.0,
    full_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scaled AdamW: AdamW on preconditioned gradients.

    Both factors are preconditioned by the parameters before the step; the released code
    updates a in place first and preconditions b by the new a.

    Args:
      learning_rate: a number or a schedule, sized as for LoRA.
      damping: see `scale_by_gram`.
      relative: see `scale_by_gram`.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      weight_decay: see `add_decayed_weights`.
      full_decay: True makes Full leaves decay to their initial values.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: a hyperparameter out of range.

    Example:
      >>> tx = riemannian(2e-4)
    """
    return optax.chain(
        scale_by_gram(damping, relative),
        _standard.adam(b1, b2, eps),
        _decay.add_decayed_weights(weight_decay, full_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
