"""Models quantised by their own code take adapters beside the kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lorax
from tests import programs
from tests.programs import normal
from tests.quantized import own_code
from tests.quantized.own_code import DEPTH, IN, OUT, codes, ready, scales
from tests.quantized.test_adapt import close, memory

KEY = jax.random.key(0)
TARGET = lorax.Target(".*q", rank=2, alpha=4)


def quick(fn):
    """A jitted function, compiled as quickly as XLA can."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def squares(fn):
    return lambda *args, **kwargs: jnp.sum(fn(*args, **kwargs) ** 2)


def started(model, target=TARGET):
    """Perturbed adapters, and what discover says."""
    kernels = lorax.discover(model.fn, model.params, model.x)
    adapters, base = lorax.init(KEY, model.params, [target], kernels)
    return programs.perturbed(adapters), base, kernels


@pytest.mark.parametrize("name", own_code.MODELS)
def test_the_adapter_lies_beside_the_kernel(name):
    model = own_code.MODELS[name]()
    close(
        model.fn(model.params, model.x),
        model.dense(model.kernels, model.params, model.x),
    )
    adapters, _, kernels = started(model)
    assert {p: kernels[p].shape for p in adapters} == {
        path: kernel.shape for path, kernel in model.kernels.items()
    }
    adapted = squares(lorax.adapt(model.fn, on_merge="error"))

    def dense(adapters, params, x):
        return squares(model.dense)(lorax.merge(adapters, model.kernels), params, x)

    run = lambda fn: quick(jax.value_and_grad(fn))(adapters, model.params, model.x)
    got, want = run(adapted), run(dense)
    close(got[0], want[0])
    close(got[1], want[1])


def test_discover_keeps_stored_and_logical_shapes_apart():
    model = own_code.MODELS["scanned_int4_packed"]()
    kernels = lorax.discover(model.fn, model.params, model.x)
    found = kernels["layer/q"]
    assert found.shape == (DEPTH, IN, IN) and found.dtype == jnp.float32
    assert (
        found.stored.shape == (DEPTH, IN // 2, IN) and found.stored.dtype == jnp.uint8
    )
    assert found.axes == lorax.types.Axes((1,), (2,), (0,)) and found.op == "dot"
    assert found.flops == 2 * 3 * DEPTH * IN * IN
    assert found.leaves == ("layer/q", "layer/scale")
    assert kernels["layer/scale"].op == "decoding"
    chosen, _ = lorax.init(KEY, model.params, ["all-linear"], kernels)
    assert [*chosen] == ["layer/q"]  # not the scale, nor the head
    described = lorax.describe(model.params, lorax.Target("all-linear"), kernels)
    (adapted,) = described.adapted
    assert adapted.path == "layer/q" and adapted.parameters == DEPTH * 8 * 2 * IN


FORMS = "ia3 oft lokr".split()  # a gain, a map of the inputs, a branch
OTHERS = "vera adalora hra miss loha".split()
OPTIONS = {"oft": {"block_size": 4}}


@pytest.mark.parametrize(
    "adapter", [*FORMS, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
@pytest.mark.parametrize("name", ["int8_per_group", "scanned_int8_after"])
def test_forms_that_do_not_read_the_kernel(name, adapter):
    model = own_code.MODELS[name]()
    target = lorax.Target(
        ".*q", rank=2, adapter=adapter, options=OPTIONS.get(adapter, {})
    )
    adapters, base, _ = started(model, target)
    frozen = lorax.tree.split(base)[1]
    adapted = squares(lorax.adapt(model.fn, on_merge="error"))

    def dense(adapters, params, x):
        kernels = lorax.Base(model.kernels, frozen) if frozen else model.kernels
        return squares(model.dense)(lorax.merge(adapters, kernels), params, x)

    got = quick(jax.value_and_grad(adapted))(adapters, base, model.x)
    close(got, quick(jax.value_and_grad(dense))(adapters, model.params, model.x))


@pytest.mark.parametrize("name", ["int8_after", "int4_packed"])
def test_dropout_is_that_of_the_dense_copy(name):
    model = own_code.MODELS[name]()
    target = dataclasses.replace(TARGET, dropout=0.4)
    adapters, _, _ = started(model, target)
    fn = lambda kernels, params, x: model.dense(kernels, params, x)
    got, want = (
        [run(lora_key=jax.random.key(seed)) for seed in (1, 2)]
        for run in (
            lambda **key: lorax.adapt(model.fn)(adapters, model.params, model.x, **key),
            lambda **key: lorax.adapt(fn)(
                adapters, model.kernels, model.params, model.x, **key
            ),
        )
    )
    close(got, want)
    assert float(jnp.abs(got[0] - got[1]).max()) > 1e-3


@pytest.mark.parametrize("vmapped", ["examples", "members"])
def test_under_vmap(vmapped):
    model = own_code.MODELS["scanned_int8_after"]()
    adapters, _, _ = started(model)
    got = jax.grad(squares(lorax.adapt(model.fn)))

    def dense(adapters, params, x):
        return squares(model.dense)(lorax.merge(adapters, model.kernels), params, x)

    def run(fn):
        if vmapped == "examples":
            each = jax.vmap(fn, (None, None, 0))
            return each(adapters, model.params, model.x[:, None])
        two = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), adapters)
        return jax.vmap(fn, (0, None, None))(two, model.params, model.x)

    close(quick(lambda: run(got))(), quick(lambda: run(jax.grad(dense)))())


def test_in_bfloat16_the_branch_is_as_beside_the_dense_kernel():
    model = own_code.MODELS["int8_after"]()
    adapters, _, _ = started(model)
    x = model.x.astype(jnp.bfloat16)
    small = lambda tree: jax.tree.map(lambda v: v.astype(jnp.bfloat16), tree)
    params = model.params | {"head": small(model.params["head"])}
    params["layer"] = params["layer"] | {"scale": small(params["layer"]["scale"])}
    got = lorax.adapt(model.fn)(adapters, params, x)
    assert got.dtype == jnp.bfloat16
    want = model.dense(lorax.merge(adapters, model.kernels), model.params, model.x)
    close(got.astype(jnp.float32), want, 0.03)


class Linear(nnx.Module):
    """As in Bonsai's models: codes and scales are variables of the module."""

    def __init__(self, seed, size, out):
        q = codes(seed, size, out).astype(np.int8)
        self.q = nnx.Param(jnp.asarray(q))
        self.scale = nnx.Param(jnp.asarray(scales(seed + 9, out), jnp.float32))

    def __call__(self, x):
        return (x @ self.q[...].astype(x.dtype)) * self.scale[...]


class Dense(nnx.Module):
    def __init__(self, seed, size, out):
        q, s = codes(seed, size, out), scales(seed + 9, out)
        self.q = nnx.Param(jnp.asarray(q * s, jnp.float32))

    def __call__(self, x):
        return x @ self.q[...]


class Block(nnx.Module):
    def __init__(self, linear, seed):
        self.up, self.down = linear(seed, IN, OUT), linear(seed + 1, OUT, IN)

    @nnx.remat
    def __call__(self, x):
        return x + self.down(jax.nn.silu(self.up(x)))


class Stack(nnx.Module):
    def __init__(self, linear):
        self.layers = nnx.List([Block(linear, 10 * i) for i in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_nnx_model():
    x = normal(0, 3, IN)

    def split(linear):
        graph, state = nnx.split(Stack(linear))
        return squares(lambda state, x: nnx.merge(graph, state)(x)), state

    (fn, state), (dense, plain) = split(Linear), split(Dense)
    kernels = lorax.discover(fn, state, x)
    adapters, state = lorax.init(KEY, state, [TARGET], kernels)
    assert {*adapters} == {f"layers/{i}/{n}/q" for i in (0, 1) for n in ("up", "down")}
    adapters = programs.perturbed(adapters)
    adapted = quick(jax.value_and_grad(lorax.adapt(fn, on_merge="error")))
    merged = lambda adapters: dense(lorax.merge(adapters, plain), x)
    close(adapted(adapters, state, x), quick(jax.value_and_grad(merged))(adapters))


def two_uses(kernel):
    """One quantised kernel read twice: in a jitted layer, and where it is tied."""
    layer = jax.jit(lambda p, x: jnp.tanh(x @ kernel(p, x.dtype)))

    def fn(params, x):
        x = layer(params["layer"], layer(params["layer"], x))
        return x @ kernel(params["layer"], x.dtype).T

    return fn


def test_one_kernel_that_is_made_several_times():
    q, s = codes(1, IN, IN), scales(2, IN)
    layer = ready(q=q.astype(np.int8), scale=s.astype(np.float32))
    params = {"layer": layer}
    fn = two_uses(lambda p, dtype: p["q"].astype(dtype) * p["scale"])
    dense = two_uses(lambda p, dtype: p)
    x, kernels = normal(0, 3, IN), None
    kernels = lorax.discover(fn, params, x)
    assert len(kernels["layer/q"].uses) == 3 and kernels["layer/q"].tied
    adapters = programs.perturbed(lorax.init(KEY, params, [TARGET], kernels)[0])
    kernel = {"layer": jnp.asarray(q * s, jnp.float32)}
    merged = lambda adapters: squares(dense)(
        lorax.merge({"layer": adapters["layer/q"]}, kernel), x
    )
    adapted = jax.value_and_grad(squares(lorax.adapt(fn, on_merge="error")))
    got = quick(adapted)(adapters, params, x)
    close(got, quick(jax.value_and_grad(merged))(adapters))


def test_arguments_that_the_function_reads_reach_it_as_given():
    model = own_code.MODELS["int8_before"]()
    adapters, _, _ = started(model)

    def fn(params, x, turned):
        return model.fn(params, -x if turned.sum() > 0 else x)

    got = lorax.adapt(fn)(adapters, model.params, model.x, np.ones(2))
    close(got, lorax.adapt(model.fn)(adapters, model.params, -model.x))


def test_the_model_keeps_its_memory():
    """No stack is dense: a gradient step needs the temporaries of the model's own."""
    depth, width, hidden = 16, 256, 1024
    shape = jax.ShapeDtypeStruct
    params = {
        "up": {"q": shape((depth, width, hidden), jnp.int8)},
        "down": {"q": shape((depth, hidden, width), jnp.int8)},
    }
    params["up"]["s"] = shape((depth, hidden), jnp.float32)
    params["down"]["s"] = shape((depth, width), jnp.float32)

    def fn(params, x):
        of = lambda p: p["q"].astype(x.dtype) * p["s"]

        def body(x, p):
            h = jax.nn.silu(x @ of(p["up"]))
            return x + (h @ p["down"]["q"].astype(x.dtype)) * p["down"]["s"], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, params)[0] ** 2)

    x = shape((8, width), jnp.float32)
    kernels = lorax.discover(fn, params, x)
    targets = [lorax.Target(".*q", rank=4)]
    adapters = jax.eval_shape(lambda p: lorax.init(KEY, p, targets, kernels)[0], params)
    adapted = memory(jax.value_and_grad(lorax.adapt(fn)), adapters, params, x)
    own = memory(jax.grad(fn, 1), params, x)
    layer = 4 * width * hidden
    assert own.temp_size_in_bytes < 4 * layer
    grown = adapted.temp_size_in_bytes - own.temp_size_in_bytes
    assert grown < 4 * 4 * sum(leaf.size for leaf in jax.tree.leaves(adapters))


def test_on_an_explicit_mesh():
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2
    )
    q, s = codes(1, DEPTH, IN, IN), scales(2, DEPTH, IN)
    params = ready(q=q.astype(np.int8), scale=s.astype(np.float32))

    def fn(params, x, spec=None):
        def body(x, p):
            w = p["q"].astype(x.dtype)
            y = jnp.einsum("bd,dh->bh", x, w, out_sharding=spec) * p["scale"]
            return x + jnp.tanh(y), None

        return jnp.sum(jax.lax.scan(body, x, params)[0] ** 2)

    x = normal(0, 4, IN)
    kernels = lorax.discover(fn, params, x)
    adapters = programs.perturbed(lorax.init(KEY, params, [TARGET], kernels)[0])
    want = jax.value_and_grad(lorax.adapt(fn))(adapters, params, x)
    place = lambda v, *spec: jax.device_put(
        v, NamedSharding(mesh, PartitionSpec(*spec))
    )
    with jax.set_mesh(mesh):
        spread = params | {"q": place(params["q"], None, "tensor", None)}
        spread["scale"] = place(params["scale"], None, None)
        rows = PartitionSpec("data", None)
        run = jax.value_and_grad(lorax.adapt(lambda params, x: fn(params, x, rows)))
        close(jax.jit(run)(adapters, spread, place(x, *rows)), want)
