"""Models of other libraries on a quantised base: the same as on its dense copy.

Their code is unaware of it: Equinox modules are trees themselves, Haiku's functions
take dicts, and Bonsai's nnx models hold variables.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from lorax.quantized import Int4, is_quantized
from tests import programs
from tests.programs import normal
from tests.quantized.test_adapt import close, dense

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
RULES = [
    (".*(up|query|qkv|linear_0).*(weight|w|kernel)", "nf4"),
    (".*(down|key).*(weight|w|kernel)", "int8"),
    ("all-linear", Int4(group=16, symmetric=False)),
]
WIDTH, HIDDEN, VOCABULARY = 64, 64, 32
TOKENS = jnp.arange(10).reshape(2, 5) % VOCABULARY


def as_on_the_dense_copy(fn, params, *args):
    """Compares values and gradients, adapters on everything that is linear."""
    kernels = lorax.discover(fn, params, *args)
    base = lorax.quantize(params, RULES, kernels)
    leaves = lorax.tree.flatten(base)
    packed = sorted(path for path, leaf in leaves.items() if is_quantized(leaf))
    target = lorax.Target("all-linear", rank=4)
    adapters, base = lorax.init(KEY, base, [target], kernels)
    assert packed == sorted(adapters)
    adapters = programs.perturbed(adapters, 0.1)
    adapted = lorax.adapt(fn, on_merge="error")

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def runs(adapters, base, *args):
        both = [
            jax.value_and_grad(adapted)(adapters, b, *args) for b in (base, dense(base))
        ]
        alone = adapted({}, base, *args), fn(dense(base), *args)
        return *both, *alone, fn(lorax.merge(adapters, base), *args)

    got, want, served, plain, merged = runs(adapters, base, *args)
    close(got, want)
    close(served, plain)
    close(got[0], merged)
    return packed


def drawn(params):
    """Random leaves, of the size at which networks are initialised."""
    return programs.filled(params, 0.1)


def test_equinox():
    eqx = pytest.importorskip("equinox", reason="needs the golden extra: equinox")

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear
        norm: eqx.nn.LayerNorm

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.attention = eqx.nn.MultiheadAttention(4, WIDTH, key=keys[0])
            self.up = eqx.nn.Linear(WIDTH, HIDDEN, key=keys[1])
            self.down = eqx.nn.Linear(HIDDEN, WIDTH, key=keys[2])
            self.norm = eqx.nn.LayerNorm(WIDTH)

        def __call__(self, x):
            y = jax.vmap(self.norm)(x)
            x = x + self.attention(y, y, y)
            return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: Block
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
            self.blocks = eqx.filter_vmap(Block)(keys[1:3])
            self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[3])

        def __call__(self, tokens):
            arrays, static = eqx.partition(self.blocks, eqx.is_array)

            @eqx.filter_checkpoint
            def body(x, layer):
                return eqx.combine(layer, static)(x), None

            x, _ = jax.lax.scan(body, jax.vmap(self.embed)(tokens), arrays)
            return jax.vmap(self.head)(x)

    model = eqx.filter_jit(Model)(KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, tokens):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(tokens) ** 2)

    packed = as_on_the_dense_copy(fn, drawn(params), TOKENS)
    assert len(packed) == 6 and "blocks/up/weight" in packed


def test_haiku():
    hk = pytest.importorskip("haiku", reason="needs the golden extra: dm-haiku")

    def model(tokens):
        x = hk.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(2):
            y = hk.LayerNorm(-1, True, True)(x)
            start = hk.initializers.VarianceScaling()
            attention = hk.MultiHeadAttention(4, 16, model_size=WIDTH, w_init=start)
            x = x + attention(y, y, y)
            x = x + hk.nets.MLP([HIDDEN, WIDTH])(x)
        return jnp.mean(hk.Linear(VOCABULARY)(x) ** 2)

    pure = hk.without_apply_rng(hk.transform(model))
    params = drawn(jax.eval_shape(pure.init, KEY, TOKENS))
    packed = as_on_the_dense_copy(pure.apply, params, TOKENS)
    assert len(packed) == 12


class Attention(nnx.Module):
    """Kernels `[width, heads, size]` under einsum, all three in one."""

    def __init__(self, rngs):
        draw = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape) / 8)
        self.qkv, self.out = draw(3, WIDTH, 4, 16), draw(4, 16, WIDTH)

    def __call__(self, x):
        q, k, v = jnp.einsum("btd,sdhk->sbthk", x, self.qkv[...])
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 4)
        h = jnp.einsum("bhts,bshk->bthk", weights, v)
        return jnp.einsum("bthk,hkd->btd", h, self.out[...])


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = Attention(rngs)
        self.gate = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    @nnx.remat
    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


def test_nnx_in_the_style_of_bonsai():
    graph, state = nnx.split(Decoder(nnx.Rngs(0)))
    fn = lambda state, tokens: jnp.mean(nnx.merge(graph, state)(tokens) ** 2)
    packed = as_on_the_dense_copy(fn, state, TOKENS)
    assert len(packed) == 10  # the tied table is not among them


def test_nnx_layers_in_one_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return Layer(rngs)

    graph, state = nnx.split(make(nnx.Rngs(0)))

    def fn(state, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return layer(x)

        return jnp.mean(forward(nnx.merge(graph, state), x) ** 2)

    kernels = lorax.discover(fn, state, normal(0, 2, 5, WIDTH))
    heads = {path for path, kernel in kernels.items() if kernel.head}
    packed = as_on_the_dense_copy(fn, state, normal(0, 2, 5, WIDTH))
    assert len(packed) == 5 - len(heads)
