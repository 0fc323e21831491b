"""More kernel views that must not be merged: stacks, vectors, padding, sums."""

from typing import Any

import jax
import jax.numpy as jnp

import lorax
from tests.programs import Program, normal, program


@program
def stacked_then_scanned() -> Program:
    """Layers kept separately and stacked for a scan; one of them is not adapted."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        layer = lambda x, w: (x + jnp.tanh(x @ w), None)
        x, _ = jax.lax.scan(layer, x, jnp.stack([params[k] for k in sorted(params)]))
        return jnp.sum(x**2)

    params = {name: normal(i, 4, 4) for i, name in enumerate(["a", "b", "c"])}
    targets = lorax.Target("a", rank=2, alpha=4), lorax.Target("c", rank=1, alpha=4)
    return Program(fn, params, (normal(9, 2, 4),), targets)


@program
def stacked_heads() -> Program:
    """q, k and v in one product, then one of them by index, then in a loop."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = jnp.stack([params["w1"], params["w2"], params["w3"]])
        q, k, v = jnp.einsum("td,ndf->ntf", x, w)
        y = jnp.tanh(q * k + v)
        y += jnp.einsum("ntf,ndf->td", jnp.stack([y, x, y]), w.mT)
        y += x @ w[1] + jnp.einsum("td,tdf->tf", x, w[jnp.array([0, 2, 2, 1, 0])])
        return jnp.sum(jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y @ w[i]), y))

    params = {f"w{i}": 0.5 * normal(i, 4, 4) for i in (1, 2, 3)}
    return Program(fn, params, (normal(0, 5, 4),))


@program
def stacked_unlike() -> Program:
    """A kernel beside a concatenated one: one term for each."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        pair = jnp.concatenate([params["w1"], params["w2"]], axis=1)
        w = jnp.stack([pair, params["w3"]])
        return jnp.sum(jnp.sin(jnp.einsum("td,ndf->ntf", x, w)))

    params = {"w1": normal(1, 4, 2), "w2": normal(2, 4, 3), "w3": normal(3, 4, 5)}
    return Program(fn, params, (normal(0, 3, 4),))


@program
def scaled_by_vectors() -> Program:
    """Per input, per output, per layer and output; leaves, constants, activations."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = params["w1"]  # [4, 6]
        y = x @ (w * params["out"]) + x @ (w / jnp.exp(params["in"])[:, None])
        y += x @ (params["scalar"] * w.T * jnp.arange(1.0, 5)).T
        y += x @ (w * x.sum(0)[:, None])
        part = jnp.concatenate([w, jnp.ones((4, 2))], axis=1) * jnp.arange(1.0, 9)
        y += (x @ part)[:, :6]
        stack = params["w2"] * params["both"][:, None]  # [3, 6, 6] by layer and output
        body = lambda y, w: (jnp.tanh(y @ w), None)
        return jnp.sum(jax.lax.scan(body, y, stack)[0])

    params = {
        "w1": normal(1, 4, 6),
        "w2": normal(2, 3, 6, 6),
        "out": normal(3, 6),
        "in": normal(4, 4),
        "scalar": normal(5),
        "both": normal(6, 3, 6),
    }
    return Program(fn, params, (normal(0, 5, 4),), (lorax.Target(r"w\d", rank=2),))


@program
def padded_and_flipped() -> Program:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = params["w"]  # [4, 6]
        wide = jnp.pad(w, ((1, 0), (0, 2)), constant_values=0.5)
        y = jnp.concatenate([x[:, :1], x], 1) @ wide
        y += jnp.pad(x @ w[::-1, ::-1], ((0, 0), (1, 1)))
        y += jnp.concatenate([x[:, :1], x], 1) @ wide[::-1, ::-1]
        return jnp.sum(jnp.tanh(y))

    return Program(fn, {"w": normal(1, 4, 6)}, (normal(0, 5, 4),))


@program
def repeated() -> Program:
    """The same kernel repeated for every member of a batch."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = jnp.broadcast_to(params["w"], (3, 4, 6))
        y = jnp.einsum("btd,bdf->btf", x, w) + jnp.einsum("btd,cdf->cbtf", x, w)[1]
        two = jnp.broadcast_to(params["w"][:, None], (4, 2, 6))
        y += jnp.einsum("btd,dnf->btnf", x, two)[:, :, 1]
        return jnp.sum(jnp.tanh(jnp.einsum("btf,bdf->btd", y, w)))

    return Program(fn, {"w": normal(1, 4, 6)}, (normal(0, 3, 5, 4),))


@program
def sums_of_kernels() -> Program:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        y = x @ (params["w1"] + params["w2"].T)
        y = jnp.tanh(y) @ (params["w1"].T - 2 * params["w2"])
        return jnp.sum(jnp.sin(y) @ (params["w3"] + params["w1"]))

    params = {"w1": normal(1, 4, 6), "w2": normal(2, 6, 4), "w3": normal(3, 4, 6)}
    targets = (lorax.Target("w1|w2", rank=2, alpha=4),)  # w3 is not adapted
    return Program(fn, params, (normal(0, 5, 4),), targets)


@program
def grouped_convolutions() -> Program:
    """Groups of two channels, strided; and one channel each (depthwise)."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        conv = lambda x, w, stride, groups: jax.lax.conv_general_dilated(
            x,
            w,
            (stride,) * 2,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        x = jnp.tanh(conv(x, params["w1"], 2, 3))
        return jnp.sum(jnp.tanh(conv(x, params["w2"], 1, 9)) ** 2)

    params = {"w1": normal(1, 3, 3, 2, 9), "w2": normal(2, 3, 2, 1, 18)}
    return Program(fn, params, (normal(0, 2, 6, 5, 6),))
