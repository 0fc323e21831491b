"""A product of eight-bit integers, with each token rounded by a scale of its own.

    y = (q_x @ q_W) * s_x * s_W,    s_x = max |x| / 127 over what is contracted

The sum is exact, in int32. The gradient is that of `x @ W`: it passes through rounding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax.interpret.terms.coded import Coded
from lorax.interpret.uses.use import Use
from lorax.quantized import NestedScales, Quantized, dequantize
from lorax.quantized.leaf import guarded, inverse

MOST = 127


def dot(use: Use, x: jax.Array | None) -> jax.Array | None:
    """Returns the frozen product in integers; None if the leaf does not ask for it.

    None also if the kernel's scales differ along what is contracted, as in a transposed
    use.
    """
    value = use.view.value
    leaf = value.leaf if isinstance(value, Coded) else None
    if leaf is None or not leaf.activations or use.op != "dot" or x is None:
        return None
    order = inverse(leaf.axes.order)
    if any(leaf.scales.shape[order[d]] > 1 for d in use.dims.read):
        return None
    contracted = use.eqn.params["dimension_numbers"][0][use.activation or 0]
    out, kind = use.out.dtype, jax.typeof(x)

    def bound(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
        both = (kernel, x) if use.activation else (x, kernel)
        params = {**use.eqn.params, "preferred_element_type": jnp.dtype(dtype)}
        return use.eqn.primitive.bind(*both, **params)

    @jax.custom_vjp
    def run(x: jax.Array, leaf: Quantized) -> jax.Array:
        wide = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), contracted, keepdims=True)
        scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / MOST
        rounded = jnp.round(wide / scale).astype(jnp.int8)
        sums = bound(rounded, leaf.codes.transpose(order), jnp.int32)
        whole = leaf.scales
        assert not isinstance(whole, NestedScales)
        # one entry each along what is contracted: an outer product
        both = bound(scale, whole.transpose(order), jnp.float32)
        return (sums.astype(jnp.float32) * both).astype(out)

    def backward(leaf: Quantized, g: jax.Array) -> tuple[jax.Array, None]:
        kernel = dequantize(leaf)
        product = lambda x: bound(x, kernel, out)
        return *jax.linear_transpose(product, kind)(g), None

    run.defvjp(lambda x, leaf: (run(x, leaf), leaf), backward)
    return run(x, guarded(leaf))
