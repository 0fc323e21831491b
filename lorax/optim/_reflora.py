"""RefLoRA: gradients for the balanced factorisation of the product.

Of all factors `(a P, P^-1 b)` with the same product, those with equal Gram matrices are
the smallest, and the paper's bound on the loss after a step is lowest for them. They
have

    P P^T = S,    S N S = M,    S = N^-1/2 (N^1/2 M N^1/2)^1/2 N^-1/2

with `N = a^T a`, `M = b b^T`. A gradient descent step there, in terms of a and b, is

    grad_a <- grad_a S^-1,    grad_b <- S grad_b

so nothing is ever refactored: the product takes the step that the balanced factors
would take, to all orders, and that step does not depend on how the product was split.
The released code uses Adam on these gradients, with moments in the coordinates of a and
b.

At b = 0 there is no S: undamped, b would stay zero for ever. The released code starts
with 100 steps of plain LoRA. Here both Gram matrices are damped by the same d, as in
LoRA-Pro, which bounds S from the start, at the cost of exact invariance.

References:
  Zhang, Li, Giannakis, RefLoRA: Refactored Low-Rank Adaptation for Efficient
  Fine-Tuning of Large Models, arXiv:2505.18877; zhangyilang/RefLoRA. Its variant
  RefLoRA-S has a number for S.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks, linalg
from lorax.optim import _decay, _gram, _pairs, _pairwise, _standard

dot = linalg.dot


class ScaleByRefLoraState(NamedTuple):
    """Empty; its type tells `training.create_state` that it reads gradients."""

    @property
    def reads_gradients(self) -> str:
        """The name of the transform, for the error message."""
        return "scale_by_reflora"


def scale_by_reflora(
    damping: _checks.Number = 0.01, relative: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of every pair by those of the balanced factors.

    Args:
      damping: damping of the Gram matrices, relative to the larger trace, at least 0.
        At 0 the balance is exact, but an all-zero b gets no step.
      relative: False adds `damping` as it is.

    Returns:
      An optax transformation without state; `update` needs the adapters, as `params`,
      and takes `pairs=` for a population member. Other leaves pass through.

    Raises:
      ValueError: negative damping; at `init`, an AdaLora; at `update`, no adapters.

    Example:
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> w = {"w": Lora(jnp.eye(2), 4 * jnp.eye(2), 1.0, Axes((0,), (1,)))}
      >>> tx = scale_by_reflora(damping=0.0)
      >>> updates, _ = tx.update(w, tx.init(w), w)
      >>> (updates["w"].a / w["w"].a)[0, 0].item()  # S is 4
      0.25
    """
    _checks.at_least("damping", damping)

    def refactored(
        update: _pairs.Pair, given: _pairs.Pair
    ) -> tuple[jax.Array, jax.Array]:
        s, inverse = balance(given, damping, relative)
        a, b = dot(update.a, inverse), dot(s, update.b)
        return _gram.true_rank_only(a, b, given.rank)

    return _pairwise.stateless("scale_by_reflora", refactored, ScaleByRefLoraState())


def reflora(
    learning_rate: _checks.NumberOrSchedule,
    damping: _checks.Number = 0.01,
    relative: bool = True,
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    weight_decay: _checks.NumberOrSchedule = 0.0,
    full_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on the gradients of the balanced factors.

    Args:
      learning_rate: a number or a schedule, sized as for LoRA.
      damping: see `scale_by_reflora`.
      relative: see `scale_by_reflora`.
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
      >>> tx = reflora(2e-4)
    """
    return optax.chain(
        scale_by_reflora(damping, relative),
        _standard.adam(b1, b2, eps),
        _decay.add_decayed_weights(weight_decay, full_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def balance(
    pair: _pairs.Pair, damping: _checks.Number, relative: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Returns S and its inverse, `[n, rank, rank]`; pseudo-inverses if undamped."""
    d = _gram.damping_of(pair, damping, relative)
    n, m = _gram.grams(pair)
    m = m + d[..., None] * jnp.eye(m.shape[-1], dtype=m.dtype)[None]
    of_n = _gram.damped_spectrum(n, d)
    up = _function(of_n, jnp.sqrt(of_n.values))
    down = _function(of_n, jnp.sqrt(_gram.reciprocal(of_n.values)))
    core = _gram.damped_spectrum(dot(up, dot(m, up)), jnp.zeros_like(d))
    root = _function(core, jnp.sqrt(core.values))
    inverse = _function(core, jnp.sqrt(_gram.reciprocal(core.values)))
    return dot(down, dot(root, down)), dot(up, dot(inverse, up))


def _function(spectrum: _gram.Spectrum, values: jax.Array) -> jax.Array:
    """The symmetric matrix with these eigenvalues."""
    return dot(spectrum.vectors * values[:, None, :], spectrum.vectors.mT)
