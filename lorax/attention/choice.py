"""`attend`, and the choice of its implementation."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lorax.attention import cudnn, lean, machine, plain, ring, splash
from lorax.attention.rule import Given, Rule

Implementation = Literal["plain", "lean", "splash", "cudnn", "tiles"]
IMPLEMENTATIONS = ("flash", *get_args(Implementation))
"""What a caller may ask for."""
STRIPED = ("flash", "tiles")
"""Those that work when devices share rows in stripes."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    segments: jax.Array | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "plain",
    striped: bool = False,
) -> jax.Array:
    """Softmax attention, grouped queries included.

        score = soft_cap tanh(scale q k / soft_cap) + bias

    Args:
      q: `[batch, time, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`; consecutive query heads share a key head.
      v: likewise.
      causal: query i sees keys 0 to i.
      window: only the last this many of those, its own included; None: all.
      soft_cap: bound on the scores, as in Gemma 2; None: no bound.
      segments: int `[batch, time]`, of packed documents; a query sees only keys of its
        own segment.
      mask: bool, broadcasts to `[batch, heads, time, keys]`; False: not seen.
      bias: added to the scores, broadcasts likewise.
      scale: of the scores; None for `head_dim ** -0.5`.
      implementation: a name from the package's table, or "flash": what `chosen` picks
        for the platform and the arguments.
      striped: True if a mesh axis "context" shards the time and the tokens are in the
        order of `stripe`; the result then is too. False: tokens in their own order.

    Returns:
      `[batch, time, heads, head_dim]`.

    Raises:
      ValueError: arguments contradict each other, or the implementation does not
        support them.

    References:
      Dao, FlashAttention-2, arXiv:2307.08691.
    """
    _check(q, k, causal, window, segments)
    rule = Rule(
        q.shape[-1] ** -0.5 if scale is None else scale, causal, window, soft_cap
    )
    pair = None if segments is None else (segments, segments)
    given = Given(pair, mask, bias)
    name = implementation
    if name == "flash":
        name = chosen(q, k, rule, given)
    refusal = _refusal(name, q, k, rule, given)
    if refusal:
        raise ValueError(
            f"attention: implementation={name!r}: {refusal}; use 'lean', which "
            "does not hold all scores either, or 'flash', which falls back to it"
        )
    if name == "tiles":
        return ring.attend(q, k, v, rule, given, striped)
    if striped and machine.auto((ring.AXIS,)):
        raise ValueError(
            f"attention: implementation={name!r} needs the tokens in their own order; "
            "use 'flash' or 'tiles' for tokens in stripes"
        )
    made = {"plain": plain, "lean": lean, "splash": splash, "cudnn": cudnn}
    return made[name].attend(q, k, v, rule, given)


def chosen(q: jax.Array, k: jax.Array, rule: Rule, given: Given) -> Implementation:
    """Returns what "flash" means: the first of a kernel, "tiles" and "lean" that fits.

    The kernel is the platform's: that of the mesh (`jax.set_mesh`), which may be one to
    compile for, or else JAX's default. With a mesh axis "context" there is no kernel.
    """
    kernels: dict[str, Implementation] = {"tpu": "splash", "gpu": "cudnn"}
    found: list[Implementation] = ["tiles", "lean"]
    if machine.platform() in kernels and not machine.auto((ring.AXIS,)):
        found.insert(0, kernels[machine.platform()])
    return next(name for name in found if not _refusal(name, q, k, rule, given))


def segments_of(real: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
    """Returns segments in which padding is a segment of its own; None: only one.

    Args:
      real: bool `[batch, time]`, False for padding; None: all are real.
      segments: int `[batch, time]`, of packed documents; None: one document.
    """
    if real is None:
        return segments
    return jnp.where(real, 0 if segments is None else segments, -1)


def _refusal(
    name: str, q: jax.Array, k: jax.Array, rule: Rule, given: Given
) -> str | None:
    """Why an implementation does not support this; None: it does."""
    if name == "cudnn":
        return cudnn.refusal(q, k, rule)
    if name == "splash":
        return splash.refusal(q, k, rule, given)
    if name == "tiles":
        return ring.refusal(q, k, rule, given)
    if name not in IMPLEMENTATIONS:
        return f"unknown; choose one of {', '.join(IMPLEMENTATIONS)}"
    return None


def _check(
    q: jax.Array,
    k: jax.Array,
    causal: bool,
    window: int | None,
    segments: jax.Array | None,
) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads"
        )
    if window is not None and (not causal or window < 1):
        raise ValueError(
            f"window={window} with causal={causal}: a window must be at least 1 and "
            "counts back from the query; set causal=True"
        )
    if segments is not None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"segments of {k.shape[1]} keys and {q.shape[1]} queries: queries and keys "
            "must be the same tokens; give a mask instead"
        )
