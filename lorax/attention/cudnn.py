"""cuDNN's fused attention, for NVIDIA GPUs; grouped heads are not repeated.

cuDNN handles causality and windows itself and does not compute what they hide. Segments
and masks are passed as a 16-bit bias `[batch, 1, time, keys]`, because cuDNN takes
packed rows only as offsets, which JAX's public function does not accept: memory is then
quadratic in time, but all heads share it.

References:
  `jax.nn.dot_product_attention(implementation="cudnn")`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorax.attention.rule import Given, Rule, seen


def refusal(q: jax.Array, k: jax.Array, rule: Rule) -> str | None:
    """Returns why cuDNN does not support this; None: it does."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _widest():
        return f"head_dim must be a multiple of 8 up to {_widest()}, not {q.shape[-1]}"
    if rule.soft_cap is not None:
        return "it does not support soft caps"
    if rule.causal and q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries are not at the positions of {k.shape[1]} keys"
    return None


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, given: Given
) -> jax.Array:
    """Computes the same as `plain.attend`."""
    window = None if rule.window is None else (rule.window - 1, 0)
    rest = rule._replace(causal=False, window=None)
    mask = seen(rest, given, jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))
    bias = given.bias
    whole = (q.shape[1], k.shape[1])  # cuDNN broadcasts only over batch and heads
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], *whole))
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)].astype(q.dtype)
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], *whole))
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=bias,
        mask=mask,
        scale=rule.scale,
        is_causal=rule.causal,
        local_window_size=window,
        implementation="cudnn",
    )


def _widest() -> int:
    """The widest head: 256 on Hopper and later."""
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return 256 if float(capability) >= 9 else 128
