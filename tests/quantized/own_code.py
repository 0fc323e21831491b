"""Models quantised by their own code, beside their dense copies.

Each entry of MODELS is `factory() -> Model`. They are written as such models usually
are: in a module's call, with the codes in a leaf beside their scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.programs import normal

IN, OUT, GROUP = 16, 12, 4


class Model(NamedTuple):
    """A quantised function, and the dense one that computes the same.

    Attributes:
      fn: a function of the stored parameters and x.
      params: the stored parameters.
      dense: a function of `{path of the codes: kernel}`, other parameters and x.
      kernels: the dequantised kernels, computed in numpy.
      x: the input.
    """

    fn: Callable[..., jax.Array]
    params: dict[str, Any]
    dense: Callable[..., jax.Array]
    kernels: dict[str, jax.Array]
    x: jax.Array


MODELS: dict[str, Callable[[], Model]] = {}


def model(factory: Callable[[], Model]) -> Callable[[], Model]:
    MODELS[factory.__name__] = factory
    return factory


def codes(seed: int, *shape: int, low: int = -127, high: int = 127) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape)


def scales(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape) / 300


def ready(**leaves: Any) -> dict[str, jax.Array]:
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()}


def head() -> jax.Array:
    return normal(99, OUT, 5)


def plain(kernels: dict[str, Any], params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The dense model of one quantised layer and a head."""
    return jnp.tanh(x @ kernels["layer/q"]) @ params["head"]


def two_layers(
    kernel: Callable[..., jax.Array], after: Callable[..., jax.Array] = lambda p, y: y
) -> Callable[..., jax.Array]:
    """A quantised layer that builds its kernel this way, and a head."""

    def fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
        layer = params["layer"]
        y = after(layer, x @ kernel(layer, x.dtype))
        return jnp.tanh(y) @ params["head"]

    return fn


def one_layer(
    kernel: Callable[..., jax.Array],
    layer: dict[str, Any],
    dense: np.ndarray,
    after: Callable[..., jax.Array] = lambda p, y: y,
) -> Model:
    fn = two_layers(kernel, after)
    params = {"layer": ready(**layer), "head": head()}
    kernels = {"layer/q": jnp.asarray(dense, jnp.float32)}
    return Model(fn, params, plain, kernels, normal(0, 3, IN))


@model
def int8_before() -> Model:
    q, s = codes(1, IN, OUT), scales(2, OUT)
    layer = {"q": q.astype(np.int8), "scale": s.astype(np.float32)}
    kernel = lambda p, dtype: p["q"].astype(dtype) * p["scale"]
    return one_layer(kernel, layer, q * s)


@model
def int8_after() -> Model:
    q, s = codes(1, IN, OUT), scales(2, OUT)
    layer = {"q": q.astype(np.int8), "scale": s.astype(np.float32)}
    kernel = lambda p, dtype: p["q"].astype(dtype)
    return one_layer(kernel, layer, q * s, lambda p, y: y * p["scale"])


@model
def int8_rows_of_torch() -> Model:
    """`[out, in]`, transposed where used; it is divided by the scale."""
    q, s = codes(1, IN, OUT), scales(2, OUT)
    layer = {"q": q.T.astype(np.int8), "scale": (1 / s)[:, None].astype(np.float32)}
    kernel = lambda p, dtype: (p["q"].astype(dtype) / p["scale"]).T
    made = one_layer(kernel, layer, (q * s).T)
    dense = lambda kernels, params, x: plain(
        {"layer/q": kernels["layer/q"].T}, params, x
    )
    return made._replace(dense=dense)


@model
def int8_per_group() -> Model:
    q, s = codes(1, IN, OUT), scales(2, IN // GROUP, OUT)
    layer = {"q": q.astype(np.int8), "scale": s.astype(np.float32)}

    def kernel(p: dict[str, Any], dtype: Any) -> jax.Array:
        blocks = p["q"].reshape(IN // GROUP, GROUP, OUT).astype(dtype)
        return (blocks * p["scale"][:, None]).reshape(IN, OUT)

    return one_layer(kernel, layer, q * np.repeat(s, GROUP, 0))


@model
def fp8_after() -> Model:
    s = 565.0 * scales(2, OUT)
    w = np.random.default_rng(1).standard_normal((IN, OUT))
    q = jnp.asarray(w, jnp.float8_e4m3fn)
    kernel = lambda p, dtype: p["q"].astype(dtype)
    layer = {"q": q, "scale": s.astype(np.float32)}
    dense = np.asarray(q, np.float64) * s
    return one_layer(
        kernel, layer, dense, lambda p, y: (y * p["scale"]).astype(y.dtype)
    )


@model
def fp8_without_a_scale() -> Model:
    q = (normal(1, IN, OUT) / 3).astype(jnp.float8_e4m3fn)
    kernel = lambda p, dtype: p["q"].astype(dtype)
    return one_layer(kernel, {"q": q}, np.asarray(q, np.float64))


@model
def int4_packed() -> Model:
    """Asymmetric, two codes per byte, a scale and a zero point per group."""
    q, s = codes(1, IN, OUT, low=0, high=16), 20 * scales(2, IN // GROUP, OUT)
    zero = codes(3, IN // GROUP, OUT, low=5, high=10)
    packed = (q[0::2] << 4 | q[1::2]).astype(np.uint8)
    layer = {
        "q": packed,
        "scale": s.astype(np.float32),
        "zero": zero.astype(np.uint8),
    }

    def kernel(p: dict[str, Any], dtype: Any) -> jax.Array:
        both = jnp.stack([p["q"] >> 4 & 15, p["q"] & 15], axis=1)
        blocks = both.reshape(-1, GROUP, OUT).astype(dtype)
        w = (blocks - p["zero"][:, None].astype(dtype)) * p["scale"][:, None]
        return w.reshape(IN, OUT)

    spread = lambda v: np.repeat(v, GROUP, 0)
    return one_layer(kernel, layer, (q - spread(zero)) * spread(s))


TABLE = np.tanh(np.linspace(-2, 2, 16)).astype(np.float32)


@model
def codebook() -> Model:
    """Sixteen numbers in the module, and the largest weight of every block."""
    q, s = codes(1, IN, OUT, low=0, high=16), 100 * scales(2, IN // GROUP, OUT)
    layer = {"q": q.astype(np.uint8), "absmax": s.astype(np.float32)}

    def kernel(p: dict[str, Any], dtype: Any) -> jax.Array:
        values = jnp.asarray(TABLE, dtype)[p["q"].astype(jnp.int32)]
        blocks = values.reshape(-1, GROUP, OUT) * p["absmax"][:, None]
        return blocks.reshape(IN, OUT)

    return one_layer(kernel, layer, TABLE[q] * np.repeat(s, GROUP, 0))


@model
def codebook_of_params() -> Model:
    """A table that is a leaf, looked up under jit, scaled after the product."""
    q, s = codes(1, IN, OUT, low=0, high=16), 100 * scales(2, OUT)
    layer = {"q": q.astype(np.uint8), "table": TABLE, "scale": s.astype(np.float32)}
    take = jax.jit(lambda p: jnp.take(p["table"], p["q"], mode="clip"))
    kernel = lambda p, dtype: take(p).astype(dtype)
    return one_layer(kernel, layer, TABLE[q] * s, lambda p, y: y * p["scale"])


HEADS, SIZE = 3, 4


@model
def einsum_heads() -> Model:
    """Gemma's kernels `[heads, in, size]`: scaled before and after the einsum."""
    q, s = codes(1, HEADS, IN, SIZE), scales(2, HEADS, SIZE)
    out, t = codes(3, HEADS, SIZE, IN), scales(4, IN)
    params = {
        "layer": ready(q=q.astype(np.int8), scale=s.astype(np.float32)),
        "out": ready(q=out.astype(np.int8), scale=t.astype(np.float32)),
        "head": normal(99, IN, 5),
    }

    def fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
        p = params["layer"]
        w = p["q"].astype(x.dtype) * p["scale"][:, None]
        h = jnp.tanh(jnp.einsum("bd,hdk->bhk", x, w))
        p = params["out"]
        y = jnp.einsum("bhk,hkd->bd", h, p["q"].astype(x.dtype)) * p["scale"]
        return y @ params["head"]

    def dense(kernels: dict[str, Any], params: dict[str, Any], x: Any) -> jax.Array:
        h = jnp.tanh(jnp.einsum("bd,hdk->bhk", x, kernels["layer/q"]))
        y = jnp.einsum("bhk,hkd->bd", h, kernels["out/q"])
        return y @ params["head"]

    kernels = {"layer/q": q * s[:, None], "out/q": out * t}
    kernels = {path: jnp.asarray(w, jnp.float32) for path, w in kernels.items()}
    return Model(fn, params, dense, kernels, normal(0, 3, IN))


@model
def a_fused_kernel() -> Model:
    """Queries and keys in one kernel, split after scaling; and concatenated by hand."""
    q, s = codes(1, IN, 2 * SIZE), scales(2, 2 * SIZE)
    left, right = codes(3, SIZE, 2), codes(4, SIZE, 2)
    t, u = scales(5, 2), scales(6, 2)
    params = {
        "layer": ready(q=q.astype(np.int8), scale=s.astype(np.float32)),
        "left": ready(q=left.astype(np.int8), scale=t.astype(np.float32)),
        "right": ready(q=right.astype(np.int8), scale=u.astype(np.float32)),
        "head": normal(99, 4, 5),
    }

    def rest(params: Any, x: jax.Array, w: jax.Array, joined: jax.Array) -> jax.Array:
        first, second = jnp.split(w, 2, axis=1)
        h = jnp.tanh(x @ first) * (x @ second)
        return jnp.tanh(h @ joined) @ params["head"]

    def fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
        of = lambda p: p["q"].astype(x.dtype) * p["scale"]
        joined = jnp.concatenate([of(params["left"]), of(params["right"])], axis=1)
        return rest(params, x, of(params["layer"]), joined)

    def dense(kernels: dict[str, Any], params: dict[str, Any], x: Any) -> jax.Array:
        joined = jnp.concatenate([kernels["left/q"], kernels["right/q"]], axis=1)
        return rest(params, x, kernels["layer/q"], joined)

    kernels = {"layer/q": q * s, "left/q": left * t, "right/q": right * u}
    kernels = {path: jnp.asarray(w, jnp.float32) for path, w in kernels.items()}
    return Model(fn, params, dense, kernels, normal(0, 3, IN))


@model
def conv() -> Model:
    q, s = codes(1, 3, 3, IN, OUT), scales(2, OUT)
    layer = {"q": q.astype(np.int8), "scale": s.astype(np.float32)}
    window = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
        p = params["layer"]
        y = window(x, p["q"].astype(x.dtype)) * p["scale"]
        return jnp.tanh(y) @ params["head"]

    def dense(kernels: dict[str, Any], params: dict[str, Any], x: Any) -> jax.Array:
        return jnp.tanh(window(x, kernels["layer/q"])) @ params["head"]

    params = {"layer": ready(**layer), "head": head()}
    kernels = {"layer/q": jnp.asarray(q * s, jnp.float32)}
    return Model(fn, params, dense, kernels, normal(0, 2, 5, 5, IN))


DEPTH = 3


def scanned(
    kernel: Callable[..., jax.Array],
    layer: dict[str, Any],
    dense: np.ndarray,
    after: Callable[..., jax.Array] = lambda p, y: y,
) -> Model:
    """Layers under scan and remat, with their own kernel in each step."""

    def fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def body(x: jax.Array, p: dict[str, Any]) -> tuple[jax.Array, None]:
            y = after(p, x @ kernel(p, x.dtype))
            return x + jnp.tanh(y), None

        return jax.lax.scan(body, x, params["layer"])[0] @ params["head"]

    def copy(kernels: dict[str, Any], params: dict[str, Any], x: Any) -> jax.Array:
        step = lambda x, w: (x + jnp.tanh(x @ w), None)
        return jax.lax.scan(step, x, kernels["layer/q"])[0] @ params["head"]

    params = {"layer": ready(**layer), "head": normal(99, IN, 5)}
    kernels = {"layer/q": jnp.asarray(dense, jnp.float32)}
    return Model(fn, params, copy, kernels, normal(0, 3, IN))


@model
def scanned_int8_before() -> Model:
    q, s = codes(1, DEPTH, IN, IN), scales(2, DEPTH, IN)
    layer = {"q": q.astype(np.int8), "scale": s.astype(np.float32)}
    kernel = lambda p, dtype: p["q"].astype(dtype) * p["scale"]
    return scanned(kernel, layer, q * s[:, None])


@model
def scanned_int8_after() -> Model:
    q, s = codes(1, DEPTH, IN, IN), scales(2, DEPTH, IN)
    layer = {"q": q.astype(np.int8), "scale": s.astype(np.float32)}
    kernel = lambda p, dtype: p["q"].astype(dtype)
    return scanned(kernel, layer, q * s[:, None], lambda p, y: y * p["scale"])


@model
def scanned_int4_packed() -> Model:
    q, s = codes(1, DEPTH, IN, IN, low=0, high=16), 20 * scales(2, DEPTH, 4, IN)
    packed = (q[:, : IN // 2] << 4 | q[:, IN // 2 :]).astype(np.uint8)
    layer = {"q": packed, "scale": s.astype(np.float32)}

    def kernel(p: dict[str, Any], dtype: Any) -> jax.Array:
        w = jnp.concatenate([p["q"] >> 4, p["q"] & 15]).astype(dtype) - 8
        return (w.reshape(4, -1, IN) * p["scale"][:, None]).reshape(IN, IN)

    return scanned(kernel, layer, (q - 8) * np.repeat(s, IN // 4, 1))


@model
def scanned_codebook() -> Model:
    q, s = codes(1, DEPTH, IN, IN, low=0, high=16), 100 * scales(2, DEPTH, IN)
    layer = {"q": q.astype(np.uint8), "scale": s.astype(np.float32)}
    kernel = lambda p, dtype: jnp.asarray(TABLE, dtype)[p["q"]] * p["scale"]
    return scanned(kernel, layer, TABLE[q] * s[:, None])


@model
def decoded_before_the_scan() -> Model:
    q, s = codes(1, DEPTH, IN, IN), scales(2, DEPTH, IN)
    params = {
        "layer": ready(q=q.astype(np.int8), scale=s.astype(np.float32)),
        "head": normal(99, IN, 5),
    }

    def fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
        p = params["layer"]
        stack = p["q"].astype(x.dtype) * p["scale"][:, None]
        step = lambda x, w: (x + jnp.tanh(x @ w), None)
        return jax.lax.scan(step, x, stack)[0] @ params["head"]

    copy = scanned(None, {}, np.zeros(1)).dense
    kernels = {"layer/q": jnp.asarray(q * s[:, None], jnp.float32)}
    return Model(fn, params, copy, kernels, normal(0, 3, IN))
