"""cuDNN's fused attention, for NVIDIA GPUs; grouped heads are not repeated.

Causality and windows are cuDNN's own, and what they hide is not computed. Segments and
masks go to it as a bias `[batch, 1, time, keys]` of 16 bits, as it knows packed rows by
offsets alone, which JAX's public function does not take: memory is then quadratic in
time, but all heads share it.

References:
  `jax.nn.dot_product_attention(implementation="cudnn")`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorax.attention.rule import Given, Rule, seen


def refusal(q: jax.Array, k: jax.Array, rule: Rule) -> str | None:
    """Returns why cuDNN cannot do this; None: it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _widest():
        return f"a head is a multiple of 8 up to {_widest()} wide, not {q.shape[-1]}"
    if rule.soft_cap is not None:
        return "it has no soft caps"
    if rule.causal and q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries are not at the places of {k.shape[1]} keys"
    return None


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, given: Given
) -> jax.Array:
    """Returns `plain.attend`."""
    window = None if rule.window is None else (rule.window - 1, 0)
    rest = rule._replace(causal=False, window=None)
    mask = seen(rest, given, jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))
    bias = given.bias
    whole = (q.shape[1], k.shape[1])  # cuDNN broadcasts over batch and heads alone
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
