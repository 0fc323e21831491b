"""Programs that use kernels in every way that lorax promises to follow.

Each entry of PROGRAMS is `factory() -> Program`; none of them may merge a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import lorax

KERNELS = lorax.Target(r".*(kernel|embedding|w\d?)", rank=2, alpha=4)


class Program(NamedTuple):
    """A function of (params, *args), its arguments, and what to adapt."""

    fn: Callable[..., jax.Array]
    params: Any
    args: tuple[Any, ...]
    targets: tuple[lorax.Target, ...] = (KERNELS,)


PROGRAMS: dict[str, Callable[[], Program]] = {}


def program(factory: Callable[[], Program]) -> Callable[[], Program]:
    PROGRAMS[factory.__name__] = factory
    return factory


def normal(seed: int, *shape: int) -> jax.Array:
    """Draws with numpy, so tests of random keys do not depend on these numbers.

    Nothing is compiled either; jnp.asarray would compile a program for every new shape.
    """
    draw = np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(draw.astype(np.float32))


def filled(abstract: Any, scale: float = 0.5) -> Any:
    """A tree of the given shapes with random leaves, biases and norms included."""
    leaves, treedef = jax.tree.flatten(abstract)

    def draw(seed: int, leaf: Any) -> jax.Array:
        draw = scale * np.asarray(normal(seed, *leaf.shape))
        return jax.device_put(draw.astype(leaf.dtype))

    return treedef.unflatten([draw(i, leaf) for i, leaf in enumerate(leaves)])


def linen(module: nn.Module, x: jax.Array, *targets: lorax.Target) -> Program:
    """The sum of squares of a linen module's output."""
    variables = filled(jax.eval_shape(module.init, jax.random.key(7), x))

    def fn(variables: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(module.apply(variables, x)) ** 2)

    return Program(fn, variables, (x,), targets or (KERNELS,))


@program
def dense() -> Program:
    model = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(5)])
    return linen(model, normal(0, 2, 3, 4))


@program
def dense_general() -> Program:
    model = nn.Sequential(
        [nn.DenseGeneral((2, 3)), jnp.tanh, nn.DenseGeneral(5, axis=(-2, -1))]
    )
    return linen(model, normal(0, 2, 3, 4))


@program
def einsum() -> Program:
    model = nn.Einsum((4, 2, 3), "btd,dce->btce")
    return linen(model, normal(0, 2, 3, 4))


@program
def conv() -> Program:
    model = nn.Sequential([nn.Conv(6, (3, 3), strides=2), jnp.tanh, nn.Conv(5, (1, 1))])
    return linen(model, normal(0, 2, 6, 6, 3))


@program
def conv_1d_dilated() -> Program:
    return linen(nn.Conv(6, (3,), kernel_dilation=2), normal(0, 2, 9, 3))


@program
def attention() -> Program:
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    return linen(model, normal(0, 2, 5, 6))


class TiedModel(nn.Module):
    """An embedding whose table is also the output head."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(7, 4)
        return embed.attend(nn.Dense(4)(embed(ids)))


@program
def tied_embedding() -> Program:
    return linen(TiedModel(), jnp.array([[0, 3, 6], [1, 1, 5]]))


class Block(nn.Module):
    """A residual layer in the form that nn.scan expects."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return x + nn.Dense(4)(jnp.tanh(nn.Dense(6)(x))), None


class Stack(nn.Module):
    """Blocks under scan, remat, both or neither."""

    scan: bool
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return block()(x, None)[0]
        for _ in range(3):
            x, _ = block()(x, None)
        return x


@program
def scanned() -> Program:
    return linen(Stack(scan=True, remat=False), normal(0, 2, 3, 4))


@program
def rematerialised() -> Program:
    return linen(Stack(scan=False, remat=True), normal(0, 2, 3, 4))


@program
def scanned_remat() -> Program:
    return linen(Stack(scan=True, remat=True), normal(0, 2, 3, 4))


@program
def scanned_layer_subset() -> Program:
    return linen(
        Stack(scan=True, remat=False),
        normal(0, 2, 3, 4),
        lorax.Target(".*Dense_0/kernel", rank=2, layers=(0, 2)),
        lorax.Target(".*Dense_1/kernel", rank=1),
    )


@program
def scanned_on_axis_one() -> Program:
    block = nn.scan(
        Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3
    )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return block()(x, None)[0]

    return linen(Model(), normal(0, 2, 3, 4))


@program
def experts() -> Program:
    model = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0
    )(features=5)
    return linen(model, normal(0, 3, 2, 4))


@program
def einsum_experts() -> Program:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(jnp.einsum("becd,edf->ebcf", x, params["w1"]))
        return jnp.sum(jnp.einsum("efd,ebcf->becd", params["w2"], h) ** 2)

    params = {"w1": normal(1, 3, 4, 6), "w2": normal(2, 3, 6, 4)}
    return Program(fn, params, (normal(0, 2, 3, 5, 4),))


@program
def ragged() -> Program:
    def fn(params: Any, x: jax.Array, groups: jax.Array) -> jax.Array:
        h = jnp.tanh(jax.lax.ragged_dot(x, params["w1"], groups))
        return jnp.sum(jax.lax.ragged_dot(h, params["w2"], groups) ** 2)

    params = {"w1": normal(1, 3, 4, 6), "w2": normal(2, 3, 6, 4)}
    return Program(fn, params, (normal(0, 8, 4), jnp.array([3, 0, 5])))


@program
def nnx_model() -> Program:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(4, 6, rngs=rngs)
            self.second = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(jnp.tanh(self.first(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    fn = lambda state, x: jnp.sum(nnx.merge(graph, state)(x) ** 2)
    return Program(fn, state, (normal(0, 2, 4),))


@program
def nnx_scan() -> Program:
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + jnp.tanh(self.linear(x))

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Layer:
        return Layer(rngs)

    graph, state = nnx.split(make(nnx.Rngs(0)))

    def fn(state: Any, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer: Layer, x: jax.Array) -> jax.Array:
            return layer(x)

        return jnp.sum(forward(nnx.merge(graph, state), x) ** 2)

    return Program(fn, state, (normal(0, 2, 4),))


@program
def custom_vjp_on_activations() -> Program:
    @jax.custom_vjp
    def clip(x: jax.Array) -> jax.Array:
        return jnp.clip(x, -1, 1)

    clip.defvjp(lambda x: (clip(x), None), lambda _, g: (g,))  # straight through

    fn = lambda params, x: jnp.sum(jnp.tanh(clip(x @ params["w1"]) @ params["w2"]))
    params = {"w1": normal(1, 4, 6), "w2": normal(2, 6, 3)}
    return Program(fn, params, (normal(0, 5, 4),))


@program
def kernel_on_the_left() -> Program:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(params["w1"] @ x)
        return jnp.sum(jnp.einsum("dce,td->cte", params["w2"], h.T) ** 2)

    return Program(
        fn, {"w1": normal(1, 4, 3), "w2": normal(2, 4, 3, 2)}, (normal(0, 3, 5),)
    )


@program
def views() -> Program:
    """Transposes, reshapes, scalars, casts, slices, splits, joins, barriers, names."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = params["w1"]  # [6, 8]
        total = x @ (w.T * 0.5).T
        total += jnp.einsum("ti,ihd->thd", x, w.reshape(6, 2, 4)).reshape(5, 8)
        left, right = jnp.split(w, 2, axis=1)
        total += jnp.concatenate([x @ right, x @ -left], axis=-1)
        total += x[:, 1:4] @ w[1:4]
        total += jnp.pad(x @ w[:, 2:6], ((0, 0), (0, 4)))
        fused = jnp.concatenate([w, params["w2"], jnp.ones((6, 2))], axis=1)  # [6, 13]
        total += (x @ fused)[:, 4:12]
        tall = jnp.concatenate([params["w3"], w], axis=0)  # [10, 8]
        total += jnp.concatenate([x, x[:, :4]], axis=1) @ tall
        parts = jnp.split(fused, [3, 9], axis=1)  # [6, 3], [6, 6], [6, 4]
        total += jnp.concatenate([x @ part for part in parts], axis=1)[:, 2:10]
        w, _ = jax.lax.optimization_barrier((w, x))
        w = checkpoint_name(w, "kernel")
        total += x @ (w / 3.0)[None][0]
        total += x @ jax.lax.stop_gradient(w)
        return jnp.sum(jnp.tanh(total) ** 2)

    params = {"w1": normal(1, 6, 8), "w2": normal(2, 6, 3), "w3": normal(3, 4, 8)}
    return Program(fn, params, (normal(0, 5, 6),))


@program
def layers_by_index() -> Program:
    """A stack indexed inside fori_loop, with the kernels carried through the loop."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def layer(i: jax.Array, state: Any) -> Any:
            w, x = state
            return w, x + jnp.tanh(x @ w[i])

        return jnp.sum(jax.lax.fori_loop(0, 3, layer, (params["w"], x))[1] ** 2)

    return Program(fn, {"w": normal(1, 3, 4, 4)}, (normal(0, 2, 4),))


@program
def unstacked_layers() -> Program:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        for w in jnp.unstack(params["w"]):
            x = x + jnp.tanh(x @ w)
        return jnp.sum(x**2)

    return Program(fn, {"w": normal(1, 3, 4, 4)}, (normal(0, 2, 4),))


@program
def branches() -> Program:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        w, v = params["w1"], params["w2"]
        y = jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.tanh(x) @ v)
        step = jax.jit(lambda w, y: y @ w.T)
        return jnp.sum(step(w, y) ** 2)

    return Program(
        fn, {"w1": normal(1, 4, 5), "w2": normal(2, 4, 5)}, (normal(0, 2, 4),)
    )


@program
def nested_scans_and_remat() -> Program:
    """Scan over groups of a scan over layers, with a checkpoint policy."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
            return x + jnp.tanh(x @ w), x.sum()

        def group(x: jax.Array, ws: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.lax.scan(layer, x, ws, reverse=True, unroll=2)

        x, sums = jax.lax.scan(group, x, params["w"])
        return jnp.sum(x**2) + sums.sum()

    return Program(fn, {"w": normal(1, 2, 4, 3, 3)}, (normal(0, 2, 3),))


def loss_and_grad(
    adapted: Callable[..., jax.Array], adapters: Any, params: Any, *args: Any
) -> tuple[jax.Array, Any]:
    return jax.jit(jax.value_and_grad(adapted))(adapters, params, *args)


def definition(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function that `adapt(fn)` must equal."""
    return lambda adapters, params, *args: fn(lorax.merge(adapters, params), *args)


def perturbed(adapters: Any, size: float = 0.3) -> Any:
    """Adapters away from their init, so that b is not zero."""

    def moved(leaf: jax.Array, noise: jax.Array) -> jax.Array:
        total = np.asarray(leaf) + np.asarray(noise)
        return jax.device_put(total, leaf.sharding if leaf.committed else None)

    return jax.tree.map(moved, adapters, filled(adapters, size))


def counted(fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function, and a list that grows by one whenever JAX traces it."""
    traces: list[int] = []

    @functools.wraps(fn)
    def traced(*args: Any) -> Any:
        traces.append(1)
        return fn(*args)

    return traced, traces


from tests import programs_kernels  # noqa: E402, F401  (adds its programs to the table)
