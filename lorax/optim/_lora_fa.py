"""LoRA-FA: freezes the first factor and preconditions the second by it.

    gA <- 0,    gB <- (a^T a + d I)^-1 gB / s^2

The kernel then moves by P_A G: the gradient of full fine-tuning, projected onto the
columns of a. The optimiser keeps no moments for a.

References:
  Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
  Fine-tuning, arXiv:2308.03303; PEFT's `optimizers/lorafa.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks, linalg, tree
from lorax.optim import _decay, _gram, _pairs, _pairwise, _standard

TRAINED = ("b", "magnitude", "value")
"""Roles of the leaves that move."""


class ScaleByLoraFaState(NamedTuple):
    """Empty; its type tells `training.create_state` that it reads gradients."""

    @property
    def reads_gradients(self) -> str:
        """The name of the transform, for the error message."""
        return "scale_by_lora_fa"


def scale_by_lora_fa(
    damping: _checks.Number = 1e-6, relative: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Freezes every `a` and preconditions every `b` by it.

    Args:
      damping: damping of `a^T a`, relative to its mean eigenvalue. Little is needed,
        because a is frozen and well-conditioned at init.
      relative: False adds `damping` as it is (1e-8 in PEFT).

    Returns:
      An optax transformation without state; `update` needs the adapters, as `params`,
      and takes `pairs=` for a population member. Other leaves pass through.

    Raises:
      ValueError: negative damping; at `init`, an AdaLora, or an all-zero `a` (as for
        embeddings at init), with which nothing could train.

    Example:
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> lora = Lora(2 * jnp.eye(1), jnp.ones((1, 1)), 1.0, Axes((0,), (1,)))
      >>> tx = scale_by_lora_fa(damping=0.0)
      >>> updates, _ = tx.update({"w": lora}, tx.init({"w": lora}), {"w": lora})
      >>> float(updates["w"].a[0, 0]), float(updates["w"].b[0, 0])
      (0.0, 0.25)
    """
    _checks.at_least("damping", damping)

    def scaled(update: _pairs.Pair, given: _pairs.Pair) -> tuple[jax.Array, jax.Array]:
        # b does not enter the damping: only a's Gram matrix is inverted.
        only_a = _pairs.Pair(given.a, 0 * given.b, given.scale, given.rank)
        d = _gram.damping_of(only_a, damping, relative)
        n = _gram.damped_spectrum(linalg.dot(given.a.mT, given.a), d)
        b = _gram.solve(n, update.b) / given.scale**2
        return _gram.true_rank_only(jnp.zeros_like(update.a), b, given.rank)

    name, state = "scale_by_lora_fa", ScaleByLoraFaState()
    return _pairwise.stateless(name, scaled, state, check=_check_alive)


def lora_fa(
    learning_rate: _checks.NumberOrSchedule,
    damping: _checks.Number = 1e-6,
    relative: bool = True,
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    weight_decay: _checks.NumberOrSchedule = 0.0,
    full_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-FA with AdamW on the second factors; magnitude and value follow Adam.

    Args:
      learning_rate: a number or a schedule, sized as for LoRA.
      damping: see `scale_by_lora_fa`.
      relative: see `scale_by_lora_fa`.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment; 1e-6 in PEFT.
      weight_decay: decay of b alone.
      full_decay: True makes Full leaves decay to their initial values.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: a hyperparameter out of range; at `init`, as for `scale_by_lora_fa`.

    Example:
      >>> tx = lora_fa(2e-4, weight_decay=0.01)
    """
    trained = functools.partial(_decay.role_mask, roles=TRAINED)
    return optax.chain(
        scale_by_lora_fa(damping, relative),
        optax.masked(_standard.adam(b1, b2, eps), trained),
        _decay.add_decayed_weights(weight_decay, full_decay, roles=("b",)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _check_alive(path: str, adapter: Any) -> None:
    if not tree.is_concrete(adapter.a):
        return
    with jax.ensure_compile_time_eval():  # known factors, closed over by a jit
        alive = bool(jnp.any(adapter.a))
    if not alive:
        raise ValueError(
            f"{path}: LoRA-FA freezes a, and this one is zero (as for embeddings at "
            "init), so nothing here could train; leave this leaf out, or use another "
            "optimiser"
        )
