"""How much of a quantised stack is dense, and the warning where all of it is."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import lorax
from tests import programs
from tests.quantized.test_adapt import close, dense, memory

KEY = jax.random.key(0)
DEPTH, WIDTH, HIDDEN = 8, 256, 512


def layer(x, w):
    return x + jax.nn.silu(x @ w["up"]) @ w["down"], None


def scanned(params, x):
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, params)[0] ** 2)


def stacked_by_the_program(params, x):
    return scanned(jax.tree.map(lambda *w: jnp.stack(w), *params.values()), x)


def taken_by_index(params, x):
    def step(x, i):
        return layer(x, jax.tree.map(lambda w: w.astype(jnp.float32)[i], params))

    return jnp.sum(jax.lax.scan(jax.checkpoint(step), x, jnp.arange(DEPTH))[0] ** 2)


def taken_apart(params, x):
    for i in range(len(params["up"])):
        x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], params))
    return jnp.sum(x**2)


def parameters(fn):
    draw = lambda i, *shape: 0.1 * programs.normal(i, *shape)
    if fn is stacked_by_the_program:
        up = lambda i: draw(i, WIDTH, HIDDEN)
        down = lambda i: draw(i + DEPTH, HIDDEN, WIDTH)
        return {f"{i}": {"up": up(i), "down": down(i)} for i in range(DEPTH)}
    return {"up": draw(0, DEPTH, WIDTH, HIDDEN), "down": draw(1, DEPTH, HIDDEN, WIDTH)}


def made(fn, params, form="nf4", **target):
    """The adapted function, its adapters and its quantised base."""
    x = programs.normal(9, 8, WIDTH)
    kernels = lorax.discover(fn, params, x)
    base = lorax.quantize(params, form, kernels)
    rule = lorax.Target("all-linear", rank=4, exclude="", **target)
    adapters = programs.perturbed(lorax.init(KEY, base, rule, kernels)[0])
    return jax.value_and_grad(lorax.adapt(fn, on_merge="error")), adapters, base, x


FORMS = [
    (scanned, "lora"),
    (scanned, "dora"),
    (scanned, "delora"),
    (stacked_by_the_program, "lora"),
    (taken_by_index, "lora"),
    (taken_by_index, "dora"),
]


@pytest.mark.once
@pytest.mark.parametrize("fn, adapter", FORMS, ids=lambda p: getattr(p, "__name__", p))
def test_one_layer_is_dense(fn, adapter):
    grad, adapters, base, x = made(fn, parameters(fn), adapter=adapter)
    close(jax.jit(grad)(adapters, base, x), jax.jit(grad)(adapters, dense(base), x))
    used = memory(grad, adapters, base, x).temp_size_in_bytes
    leaves = jax.tree.leaves(base)
    stacked = fn is stacked_by_the_program  # then the packed arrays are copied
    packed = sum(a.nbytes for a in leaves) if stacked else 0
    own = sum(a.nbytes for a in jax.tree.leaves(adapters))
    # a layer's two kernels, and what the gradients of a few adapters need
    assert used - packed - 3 * own < 3 * 4 * WIDTH * HIDDEN


@pytest.mark.once
@pytest.mark.parametrize(
    "adapter", ["dora", pytest.param("lora", marks=pytest.mark.slow)]
)
def test_layers_taken_apart_or_chosen(adapter):
    params = jax.tree.map(lambda w: w[:3], parameters(taken_apart))
    grad, adapters, base, x = made(taken_apart, params, adapter=adapter)
    close(jax.jit(grad)(adapters, base, x), jax.jit(grad)(adapters, dense(base), x))
    chosen = made(taken_apart, params, adapter=adapter, layers=(0, 2))
    close(jax.jit(grad)(*chosen[1:]), jax.jit(grad)(chosen[1], dense(base), x))


def largest(compiled):
    """The size of the largest floating-point array in a compiled program."""
    found = re.findall(r"\b(?:f64|f32|bf16|f16)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, sizes.split(","))) for sizes in found)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_the_compiled_program_mentions_no_dense_stack(form):
    grad, adapters, base, x = made(scanned, parameters(scanned), form)
    stack = DEPTH * WIDTH * HIDDEN
    program = jax.jit(grad).lower(adapters, base, x).compile()
    assert largest(program) <= WIDTH * HIDDEN
    whole = jax.jit(grad).lower(adapters, dense(base), x).compile()
    assert largest(whole) == stack


def test_init_of_dora_is_that_of_the_dense_copy():
    params = parameters(scanned)
    x = programs.normal(9, 8, WIDTH)
    kernels = lorax.discover(scanned, params, x)
    rule = lorax.Target("up|down", rank=4, adapter="dora")
    base = lorax.quantize(params, "int8", kernels)
    make = lambda base: lorax.init(KEY, base, rule, kernels)[0]
    close(make(base), make(dense(base)))
    assert memory(make, base).temp_size_in_bytes < 2 * 4 * WIDTH * HIDDEN


@pytest.mark.filterwarnings("ignore::lorax.MergeWarning")
def test_a_stack_of_two_formats_is_decoded_and_that_is_said():
    params = parameters(stacked_by_the_program)
    x = programs.normal(9, 8, WIDTH)
    kernels = lorax.discover(stacked_by_the_program, params, x)
    rules = [("3/.*", "int8"), ("all-linear", "nf4")]
    base = lorax.quantize(params, rules, kernels)
    adapted = lorax.adapt(stacked_by_the_program)
    said = r"0/down and 7 more: 'scan' at .*reads all of a quantised kernel of shape \["
    with pytest.warns(lorax.MergeWarning, match=said):
        close(adapted({}, base, x), stacked_by_the_program(dense(base), x))
    with pytest.raises(ValueError, match="reads all of a quantised.*on_merge='warn'"):
        lorax.adapt(stacked_by_the_program, on_merge="error")({}, base, x)


def test_a_use_that_is_not_linear_says_that_it_decodes():
    params = parameters(scanned)
    norm = lambda params, x: scanned(params, x) + jnp.sum(params["up"] ** 2)
    x = programs.normal(9, 8, WIDTH)
    base = lorax.quantize(params, [("up", "nf4")], lorax.discover(norm, params, x))
    with pytest.warns(lorax.MergeWarning, match="up: 'integer_pow' at .*reads all of"):
        close(lorax.adapt(norm)({}, base, x), norm(dense(base), x))


def test_axes_of_another_kind_decode_for_dora_and_that_is_said():
    def experts(params, x):
        return jnp.sum(jnp.einsum("td,edf->tef", x, params["w"]) ** 2)

    params, x = {"w": programs.normal(0, 3, 64, 32)}, programs.normal(1, 4, 64)
    kernels = lorax.discover(experts, params, x)
    split = lorax.quantized.Int8().quantize(params["w"], lorax.Axes((1,), (2,), (0,)))
    rule = lorax.Target("w", rank=2, adapter="dora")
    adapters = programs.perturbed(lorax.init(KEY, {"w": split}, rule, kernels)[0])
    adapted = lorax.adapt(experts)
    with pytest.warns(
        lorax.MergeWarning, match="w: Dora reads the kernel, but along other axes"
    ):
        got = adapted(adapters, {"w": split}, x)
    close(got, experts(lorax.merge(adapters, {"w": split}), x))
