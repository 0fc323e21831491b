"""More programs for `tests.programs`: layers that return their kernels.

`nnx.scan` and `nnx.remat` return all of a layer's state, changed or not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.programs import Program, filled, normal, program


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.tanh(self.up(x)))


def nnx_program(forward: Any, make: Any) -> Program:
    """The sum of squares of `forward(layer or layers, x)`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    fn = lambda state, x: jnp.sum(forward(nnx.merge(graph, state), x) ** 2)
    return Program(fn, filled(state), (normal(0, 2, 4),))


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def layers(rngs: nnx.Rngs) -> Layer:
    return Layer(rngs)


@nnx.remat
def rematerialised(layer: Layer, x: jax.Array) -> jax.Array:
    return layer(x)


def over(body: Any) -> Any:
    """`nnx.scan` of a layer over the first axis of its state."""
    return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)


@program
def nnx_scan_of_remat() -> Program:
    return nnx_program(over(rematerialised), layers)


@program
def nnx_scan_of_jit_and_cond() -> Program:
    @nnx.jit
    def chosen(layer: Layer, x: jax.Array) -> jax.Array:
        half = lambda layer, x: layer(x / 2)
        return nnx.cond(x[0, 0] > 0, rematerialised, half, layer, x)

    return nnx_program(over(chosen), layers)


@program
def nnx_loop() -> Program:
    """A layer carried through `nnx.fori_loop`."""

    def forward(layer: Layer, x: jax.Array) -> jax.Array:
        body = lambda i, state: (state[0], rematerialised(*state))
        return nnx.fori_loop(0, 2, body, (layer, x))[1]

    return nnx_program(forward, Layer)


@program
def kernels_handed_back() -> Program:
    """Kernels returned by every kind of body, and used inside and after it."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        step = lambda x, w: (jnp.tanh(x @ w), jax.checkpoint(lambda w: w)(w))
        x, w = jax.lax.scan(step, x, params["w1"], reverse=True)
        x, _ = jax.lax.scan(step, x, w)
        branch = lambda w, x: (x @ w[0], jax.jit(lambda w: w)(w))
        other = lambda w, x: (x @ w[1], w)
        x, w = jax.lax.cond(x[0, 0] > 0, branch, other, w, x)
        carry = lambda state, _: (branch(*state)[::-1], None)
        (w, x), _ = jax.lax.scan(carry, (w, x), length=2)
        return jnp.sum((x @ w[2]) ** 2)

    return Program(fn, {"w1": 0.5 * normal(1, 3, 4, 4)}, (normal(0, 2, 4),))
