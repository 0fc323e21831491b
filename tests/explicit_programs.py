"""Programs written for a mesh of Explicit axes, 4 "x" by 2 "y".

Each entry of PROGRAMS is `factory() -> Sharded`; none of them may merge a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tests.programs import normal


class Sharded(NamedTuple):
    """A function of (params, x), its arguments, and how each is sharded."""

    fn: Callable[[Any, jax.Array], jax.Array]
    params: dict[str, tuple[jax.Array, P]]
    x: jax.Array
    x_spec: P = P("x")


PROGRAMS: dict[str, Callable[[], Sharded]] = {}


def program(factory: Callable[[], Sharded]) -> Callable[[], Sharded]:
    PROGRAMS[factory.__name__] = factory
    return factory


def loss(y: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(y) ** 2)


def product(x: jax.Array, w: jax.Array, *entries: Any, **more: Any) -> jax.Array:
    return jnp.einsum("td,de->te", x, w, out_sharding=P(*entries, **more))


BOTH = {"w": (normal(1, 8, 16), P("x", "y")), "v": (normal(2, 16, 8), P("y", "x"))}
X = normal(0, 8, 8)


@program
def gathered() -> Sharded:
    """FSDP: each kernel is gathered where it is used; and one kernel that is not."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ reshard(params["w"], P()) + params["bias"])
        h = jnp.tanh(h @ reshard(params["v"], P(None, "y")))
        return loss(product(h, params["u"], "x", None))

    more = {"u": (normal(3, 8, 4), P("x")), "bias": (normal(4, 16), P())}
    return Sharded(fn, BOTH | more, X)


@program
def columns_and_rows() -> Sharded:
    """Tensor parallel: the first kernel by columns, with its bias, the next by rows."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["w"] + params["bias"])
        return loss(product(h, params["v"], "x", None))

    bias = {"bias": (normal(4, 16), P("y"))}
    whole = {"w": (BOTH["w"][0], P(None, "y")), "v": (BOTH["v"][0], P("y"))}
    return Sharded(fn, whole | bias, X)


@program
def both_axes() -> Sharded:
    """Kernels sharded along both axes, contracted over sharded dimensions."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ params["w"])
        y = product(h, params["v"], "x", None)
        z = product(reshard(y, P(None, "x")), params["w"], None, ("x", "y"))
        return loss(y) + loss(z) + loss(product(y, params["w"], None, None))

    return Sharded(fn, BOTH, X)


@program
def unreduced() -> Sharded:
    """A result that stays a sum over devices until it is resharded."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        y = product(x, params["w"], "x", None, unreduced={"y"})
        return loss(reshard(y, P("x")))

    return Sharded(fn, {"w": (normal(1, 8, 16), P("y"))}, X, P("x", "y"))


@program
def heads() -> Sharded:
    """Three-dimensional kernels, one of them a view of a matrix; one on the left."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        q = jnp.einsum("td,dhk->thk", x, params["w"])
        split = jax.lax.reshape(params["u"], (8, 4, 4), out_sharding=P(None, None, "y"))
        q = q + reshard(jnp.einsum("td,dhk->thk", x, split), P("x", "y"))
        q = q + jnp.einsum("td,dhk->thk", x, params["u"].reshape(8, 4, 4))
        y = jnp.einsum("thk,hkd->td", jnp.tanh(q), params["v"], out_sharding=P("x"))
        return loss(jnp.einsum("dce,td->cte", params["w"], y, out_sharding=P("y")))

    params = {
        "w": (normal(1, 8, 4, 4), P(None, "y")),
        "v": (normal(2, 4, 4, 8), P("y")),
        "u": (normal(3, 8, 16), P(None, "y")),
    }
    return Sharded(fn, params, X)


@program
def fused() -> Sharded:
    """Kernels concatenated, and the result sharded across the seam."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = jnp.concatenate([params["w"], params["v"]], axis=1)
        return loss(product(x, reshard(w, P(None, "y")), "x", "y"))

    params = {"w": (normal(1, 8, 6), P("x")), "v": (normal(2, 8, 10), P("x"))}
    return Sharded(fn, params, X)


@program
def layers() -> Sharded:
    """A scan over gathered layers, then one over sharded ones, rematerialised."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def gathered(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return x + jnp.tanh(product(x, reshard(w, P(None, "y")), "x", None)), None

        @jax.checkpoint
        def sharded(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return x + jnp.tanh(product(x, w, "x", None)), None

        x = jax.lax.scan(gathered, x, params["w"])[0]
        return loss(jax.lax.scan(sharded, x, params["w"])[0])

    return Sharded(fn, {"w": (normal(1, 3, 8, 8), P(None, "x", "y"))}, X)


@program
def control_flow() -> Sharded:
    """Loops, branches and jitted functions whose results are sharded as specified."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = jax.lax.with_sharding_constraint(params["w"], P("x", "y"))
        step = lambda _, wx: (wx[0], jnp.tanh(product(wx[1], wx[0], "x", None)))
        x = jax.lax.fori_loop(0, 2, step, (w, x))[1]
        use = lambda: product(x, w, "x", None)
        y = jax.lax.cond(jnp.sum(x) > 0, use, lambda: jnp.zeros_like(x))
        where = {"in_shardings": (P("x"), P("x", "y")), "out_shardings": P("x")}
        jitted = jax.jit(lambda x, w: product(x, w, "x", None), **where)
        return loss(jitted(x, w)) + loss(jax.jit(product)(x, w)) + loss(y)

    return Sharded(fn, {"w": (normal(1, 8, 8), P("x", "y"))}, X)


@program
def automatic_part() -> Sharded:
    """Part of the program leaves shardings to the compiler."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        part = lambda w, x: jnp.tanh(x @ w) @ w.T
        return loss(jax.sharding.auto_axes(part, out_sharding=P("x"))(params["w"], x))

    return Sharded(fn, {"w": BOTH["w"]}, X)


@program
def tied_embedding() -> Sharded:
    def fn(params: Any, ids: jax.Array) -> jax.Array:
        table = params["w"]
        h = jnp.tanh(table.at[ids].get(out_sharding=P("x", None, "y")))
        h = h + reshard(reshard(table, P())[reshard(ids, P())], P("x", None, "y"))
        return loss(jnp.einsum("bsd,vd->bsv", h, table, out_sharding=P("x")))

    ids = jnp.arange(32).reshape(8, 4) * 7 % 16
    return Sharded(fn, {"w": (normal(1, 16, 8), P("x", "y"))}, ids)


@program
def experts() -> Sharded:
    """Experts over one mesh axis, their width over the other; and grouped rows."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.einsum("td,edf->tef", x, params["w"], out_sharding=P(None, "x", "y"))
        each = P(None, "x")
        y = jnp.einsum("tef,efd->ted", jnp.tanh(h), params["v"], out_sharding=each)
        group = jnp.array([2, 1, 4, 1])
        grouped = jax.sharding.auto_axes(
            lambda x, w: jax.lax.ragged_dot(x, w, group), out_sharding=P(None, "y")
        )
        return loss(y) + loss(grouped(x, params["u"]))

    params = {
        "w": (normal(1, 4, 8, 6), P("x", None, "y")),
        "v": (normal(2, 4, 6, 8), P("x", "y")),
        "u": (normal(3, 4, 8, 6), P(None, "x", "y")),
    }
    return Sharded(fn, params, X)


@program
def convolution() -> Sharded:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            params["w"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            out_sharding=P("x", None, None, "y"),
        )
        return loss(y)

    kernel = {"w": (normal(1, 3, 3, 4, 8), P(None, None, None, "y"))}
    return Sharded(fn, kernel, normal(0, 8, 4, 4, 4))


@program
def mapped_shards() -> Sharded:
    """`shard_map` over Explicit axes: inputs must be sharded as the specs say."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def gather(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ jax.lax.all_gather(w, "x", axis=1, tiled=True))

        def reduce(w: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.psum(x @ w, "y")

        specs = {"in_specs": (P(None, "x"), P("x")), "out_specs": P("x")}
        h = jax.shard_map(gather, **specs)(params["w"], x)
        specs = {"in_specs": (P("y"), P("x", "y")), "out_specs": P("x")}
        rows = reshard(params["v"], P("y"))
        return loss(jax.shard_map(reduce, **specs)(rows, reshard(h, P("x", "y"))))

    params = {"w": (normal(1, 8, 12), P(None, "x")), "v": (normal(2, 12, 8), P("x"))}
    return Sharded(fn, params, X)
