"""CorDA: starts from the part of the kernel that matters most (or least) to its inputs.

With C = X^T X / n the second moments of the kernel's inputs,

    C W0 = V S U^T,    a = C^-1 V_r sqrt(S_r / s),    b = sqrt(S_r / s) U_r^T,
    W0 <- W0 - s a b

where r picks the first r triplets ("instruction": the inputs are the task to learn, and
the adapter starts from the part that responds to them most) or the last ("knowledge":
the inputs are what must not be forgotten, and the adapter starts from the part that
matters least). No inverse is formed: since C^-1 V S = W0 U,

    a = W0 U_r / sqrt(s S_r),    s a b = W0 U_r U_r^T

which is exactly the paper's product, and stays accurate where its C^-1 does not.

C is damped by `damp` times the mean of its diagonal, as in the authors' code and PEFT;
they double the damping until their inverse is good, which is not needed here. The size
of C does not affect the product, but it does affect the balance of a and b. The paper
does not mention this; the code divides each batch by its largest entry and sums over
tokens, so longer sequences shift size from a to b. Here C is scaled to a mean diagonal
of one.

Where W0 U_r is zero (a kernel of lower rank), a is V_r and b zero, as in LoRA: two zero
factors would stay zero.

References:
  Yang et al., CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
  for Task-Aware Parameter-Efficient Fine-tuning, arXiv:2406.05223;
  github.com/iboing/CorDA.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax import _checks, linalg
from lorax.adapters import making
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.targets import Target
from lorax.types import Covariance

OPTIONS = {"mode": "instruction", "damp": 0.01}
MODES = ("instruction", "knowledge")


def corda(
    key: jax.Array, kernel: Kernel, target: Target, stats: Covariance
) -> tuple[Any, Kernel]:
    """Returns a context-oriented part of the kernel, and the kernel without it.

    Args:
      key: not used.
      kernel: the leaf and its axes.
      target: its options are `mode`: "instruction" (the default, as in PEFT) or
        "knowledge"; and `damp`: 0.01 as in the authors' code.
      stats: this path's statistics from `lorax.calibrate`, on batches of the task
        ("instruction") or of the knowledge to keep. For an expert that read nothing,
        C is the identity.

    Raises:
      ValueError: an unknown mode, a damping that is not positive, or statistics for
        other targets.
    """
    del key
    options, rank = making.options(target, OPTIONS), target.rank
    _check(kernel, options)
    w = making.matrices(kernel, target)
    build.require_shape(kernel, stats.matrix, (*w.shape[:-1], w.shape[-2]))
    size = jnp.trace(stats.matrix, axis1=-2, axis2=-1)[..., None, None] / w.shape[-2]
    damp = jnp.where(size > 0, options["damp"], 1.0)  # an expert that read nothing
    damped = linalg.dot(stats.matrix / jnp.where(size > 0, size, 1), w) + damp * w
    v, s, ut = linalg.svd(damped, min(w.shape[-2:]))
    part = slice(None, rank) if options["mode"] == "instruction" else slice(-rank, None)
    v, s, ut = v[..., part], s[..., part], ut[..., part, :]
    moved = linalg.dot(w, ut.mT)
    long = jnp.linalg.norm(moved, axis=-2)
    lost = linalg.negligible(long, jnp.linalg.norm(w, axis=(-2, -1))[..., None])
    s = jnp.maximum(s, damp[..., 0] * long)  # a lower bound, in case of rounding
    root = jnp.sqrt(s / target.scale)
    a = jnp.where(
        lost[..., None, :],
        v,
        moved / jnp.where(lost, 1, target.scale * root)[..., None, :],
    )
    b = jnp.where(lost, 0, root)[..., :, None] * ut
    adapter = build.around_factors(kernel, target, a, b)
    recipe = {"rank": rank, "scale": target.scale, "options": options}
    return build.moved(kernel, adapter, "corda", **recipe)


def _check(kernel: Kernel, options: dict) -> None:
    _checks.one_of("mode", options["mode"], MODES, where=kernel.path)
    if not options["damp"] > 0:
        raise ValueError(f"{kernel.path}: damp={options['damp']}; give a number > 0")
