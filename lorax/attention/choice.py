"""`attend`, and which implementation it takes."""

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
"""Of these, what devices can compute with that share rows in stripes."""


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
      k: `[batch, keys, kv_heads, head_dim]`; the first heads share the first of these.
      v: likewise.
      causal: query i sees keys 0 to i.
      window: of those only the last ones, this many, its own included; None: all.
      soft_cap: bound of the scores, as in Gemma 2; None: none.
      segments: int `[batch, time]`, of packed documents; a query sees keys of its own.
      mask: bool, broadcasts to `[batch, heads, time, keys]`; False: not seen.
      bias: added to the scores, broadcasts likewise.
      scale: of the scores; None for `head_dim ** -0.5`.
      implementation: one of the package's table; or "flash", the one that `chosen`
        finds for the platform and the arguments.
      striped: where a mesh axis "context" cuts the time, tokens are in the order of
        `stripe`, and so is the result; else both are in their own order.

    Returns:
      `[batch, time, heads, head_dim]`.

    Raises:
      ValueError: arguments that exclude another, or that the implementation cannot
        honour, which it then says.

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
            "use 'flash' or 'tiles' for what is in stripes"
        )
    made = {"plain": plain, "lean": lean, "splash": splash, "cudnn": cudnn}
    return made[name].attend(q, k, v, rule, given)


def chosen(q: jax.Array, k: jax.Array, rule: Rule, given: Given) -> Implementation:
    """Returns what "flash" is: the first that can of a kernel, "tiles" and "lean".

    The kernel is that of the platform, which is that of the mesh (`jax.set_mesh`),
    perhaps one to compile for, or JAX's default. A mesh axis "context" has tiles alone.
    """
    kernels: dict[str, Implementation] = {"tpu": "splash", "gpu": "cudnn"}
    found: list[Implementation] = ["tiles", "lean"]
    if machine.platform() in kernels and not machine.auto((ring.AXIS,)):
        found.insert(0, kernels[machine.platform()])
    return next(name for name in found if not _refusal(name, q, k, rule, given))


def segments_of(real: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
    """Returns segments in which padding is one of its own; None: all is one.

    Args:
      real: bool `[batch, time]`, False for padding; None: all are real.
      segments: int `[batch, time]`, of packed documents; None: one.
    """
    if real is None:
        return segments
    return jnp.where(real, 0 if segments is None else segments, -1)


def _refusal(
    name: str, q: jax.Array, k: jax.Array, rule: Rule, given: Given
) -> str | None:
    """Why an implementation cannot do this; None: it can."""
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
            f"{q.shape[2]} heads of queries cannot share {k.shape[2]} of keys"
        )
    if window is not None and (not causal or window < 1):
        raise ValueError(
            f"window={window} with causal={causal}: a window is at least 1, of keys "
            "before the query; set causal=True"
        )
    if segments is not None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"segments say which of {k.shape[1]} keys belong to {q.shape[1]} queries "
            "only where these are the same tokens; give a mask"
        )
