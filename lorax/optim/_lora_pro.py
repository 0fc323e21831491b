"""LoRA-Pro: factor gradients that move the kernel as full fine-tuning would.

    hA = gA M^-1 / s^2 + A X,    hB = N^-1 (gB - A^T gA M^-1 B) / s^2 - X B

with `N = A^T A`, `M = B B^T`: then `s (hA B + A hB)` is the projection of the kernel's
gradient onto what the factors can express (`_projection.py` has the closed form).

At the standard init B = 0, and the first step is exact. At the second, `B = O(lr)`, so
`hA = O(1 / lr)`, and one minibatch's direction would replace A at *any* learning rate.
N and M are therefore both damped by

    d = damping * max(tr N, tr M) / rank

which bounds that step. With damping, X slightly affects the kernel's update.

The choice of moments decides what the kernel follows. Adam on hA and hB divides every
entry by its own size, so the kernel's step is no longer a projection. With moments of
the projected gradient itself it still is (`_lora_pro_moments.py`).

References:
  Wang et al., LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, arXiv:2407.18242.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import optax

from lorax import _checks
from lorax.optim import _decay, _lora_pro_moments, _pairs, _pairwise, _projection

Choice = Literal["sylvester", "symmetry", "zero"]
Mode = Literal["rowcol", "factor", "sgd", "full"]
MODES = ("rowcol", "factor", "sgd", "full")


class ScaleByLoraProState(NamedTuple):
    """Empty; its type tells `training.create_state` that it reads gradients."""

    @property
    def reads_gradients(self) -> str:
        """The name of the transform, for the error message."""
        return "scale_by_lora_pro"


def scale_by_lora_pro(
    x: Choice = "sylvester", damping: _checks.Number = 0.1, relative: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of every pair by LoRA-Pro's.

    This changes norms by orders of magnitude (1 / s^2, inverse Gram matrices), so clip
    the raw gradients, before this transform. Other leaves pass through.

    Args:
      x: which of the equivalent pairs to use. "sylvester", the paper's: closest to the
        raw gradients. "symmetry": both factors contribute equally to the kernel's step.
        "zero": no X term. Without damping, all three give the same kernel step under
        plain SGD.
      damping: damping of the Gram matrices, relative to the larger trace; at least 0.
        Noisier gradients need more. 0.1 suits Adam on the factors; before
        `scale_by_lora_pro_rowcol` or `_full`, use the same damping as theirs.
      relative: False adds `damping` as it is (1e-8 in the released code).

    Returns:
      An optax transformation without state; `update` needs the adapters, as `params`,
      and takes `pairs=` for a population member.

    Raises:
      ValueError: an unknown `x`, negative damping; at `init`, an AdaLora; at `update`,
        no adapters.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> lora = Lora(jnp.eye(2), jnp.zeros((2, 2)), 2.0, Axes((0,), (1,)))
      >>> grads = {"w": lora.replace(a=jnp.zeros((2, 2)), b=jnp.ones((2, 2)))}
      >>> tx = scale_by_lora_pro(damping=0.0)
      >>> updates, _ = tx.update(grads, tx.init({"w": lora}), {"w": lora})
      >>> updates["w"].b  # N^-1 gB / s^2
      Array([[0.25, 0.25],
             [0.25, 0.25]], dtype=float32)
    """
    return _solved(_projection.Solution(x, damping, relative).checked())


def _solved(
    solution: _projection.Solution,
) -> optax.GradientTransformationExtraArgs:
    def adjusted(
        update: _pairs.Pair, given: _pairs.Pair
    ) -> tuple[jax.Array, jax.Array]:
        return _projection.project(update, given, solution)

    return _pairwise.stateless("scale_by_lora_pro", adjusted, ScaleByLoraProState())


def lora_pro(
    learning_rate: _checks.NumberOrSchedule,
    mode: Mode = "rowcol",
    x: Choice = "sylvester",
    damping: _checks.Number | None = None,
    relative: bool = True,
    b1: _checks.Number | None = None,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    weight_decay: _checks.NumberOrSchedule = 0.0,
    full_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro with SGD, or with one of three forms of Adam.

    With P(.) the projection onto what the factors can express and g = P(G) the
    projected gradient of the kernel, the kernel steps along

    | mode | step of the kernel | like full fine-tuning with |
    |---|---|---|
    | rowcol | P(g / root of row and column means of g^2) | Adafactor, no momentum |
    | full | P(Adam's step on g), the paper's | Adam |
    | sgd | g | SGD |
    | factor | s (uA B + A uB), uA, uB Adam's steps on hA, hB | none: LoRA's Adam |

    | mode | moments | state per kernel [n, m] | learning rate as for |
    |---|---|---|---|
    | rowcol | row and column means of g^2 | n + m | full fine-tuning |
    | full | of g, dense | 2 n m | full |
    | sgd | none | none | full |
    | factor | of hA and hB | 2 r (n + m) | LoRA |

    Leaves outside the pairs (magnitude, value) follow Adam; in "sgd", plain SGD.

    Args:
      learning_rate: a number or a schedule, sized as in the table.
      mode: "rowcol" to follow full fine-tuning in little memory, "full" for parity with
        the released code, "factor" for Adam on the factors at LoRA's learning rates.
      x: see `scale_by_lora_pro`.
      damping: see `scale_by_lora_pro`; None for 0.1 in "factor" and 0.01 in the other
        modes. With very noisy gradients, 0.1 is better in those, too.
      relative: see `scale_by_lora_pro`.
      b1: decay rate of the first moment; None for 0.9, except that the factors get no
        momentum in "rowcol". A number adds one there, with state of the factors' size.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment; in "rowcol" its square is added to
        the means.
      weight_decay: see `add_decayed_weights`; 0 as in the released code.
      full_decay: True makes Full leaves decay to their initial values.

    Returns:
      An optax transformation; `update` needs the adapters, as `params`.

    Raises:
      ValueError: an unknown mode or `x`, a hyperparameter out of range.

    Example:
      >>> tx = lora_pro(1e-3)
      >>> tx = lora_pro(1e-2, mode="factor")  # a rate of LoRA's
    """
    _checks.one_of("mode", mode, MODES)
    if damping is None:
        damping = 0.1 if mode == "factor" else 0.01
    solution = _projection.Solution(x, damping, relative).checked()
    return optax.chain(
        _solved(solution),
        _lora_pro_moments.moments(mode, solution, b1, b2, eps),
        _decay.add_decayed_weights(weight_decay, full_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
