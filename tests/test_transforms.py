"""adapt under transformations, precisions, meshes and dropout; and what it merges."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import lorax
from tests import programs
from tests.test_adapt import assert_close, setup


def test_one_function_by_hand():
    # y = x @ (W + scale a b) with scale 3, one number at a time
    params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    adapter = lorax.Lora(
        jnp.array([[1.0], [-1.0]]), jnp.array([[2.0, 5.0]]), 3.0, lorax.Axes((0,), (1,))
    )
    x = jnp.array([[10.0, 1.0]])
    # x @ W = [13, 24]; x @ a = 9; 3 * 9 * b = [54, 135]
    fn = lambda params, x: x @ params["w"]
    np.testing.assert_array_equal(
        lorax.adapt(fn)({"w": adapter}, params, x), [[67.0, 159.0]]
    )
    # W + 3 a b = [[1 + 6, 2 + 15], [3 - 6, 4 - 15]]
    np.testing.assert_array_equal(
        lorax.merge({"w": adapter}, params)["w"], [[7.0, 17.0], [-3.0, -11.0]]
    )
    # d sum(y) / d b = 3 * (x @ a) = 27 for both outputs, d / d a = 3 x^T sum(b) = 21 x
    grads = jax.grad(lambda a: lorax.adapt(fn)(a, params, x).sum())({"w": adapter})
    np.testing.assert_array_equal(grads["w"].b, [[27.0, 27.0]])
    np.testing.assert_array_equal(grads["w"].a, [[210.0], [21.0]])


def test_vmap_over_stacked_adapters():
    program, kernels, adapters, params = setup("scanned_remat")
    four = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x, 0 * x]), adapters)
    mapped = lambda fn: jax.vmap(jax.value_and_grad(fn), (0, None, None))
    adapted = lorax.adapt(program.fn, on_merge="error")
    got = jax.jit(mapped(adapted))(four, params, *program.args)
    want = jax.jit(mapped(programs.definition(program.fn)))(four, params, *program.args)
    assert_close(got, want)


def test_forward_mode_and_hessian():
    program, _, adapters, params = setup("dense")
    flat, unravel = jax.flatten_util.ravel_pytree(adapters)
    hessian = lambda fn: jax.hessian(lambda v: fn(unravel(v), params, *program.args))
    got = jax.jit(hessian(lorax.adapt(program.fn, on_merge="error")))(flat)
    want = jax.jit(hessian(programs.definition(program.fn)))(flat)
    assert_close(got, want)


@pytest.mark.parametrize("op", ["dot", "conv", "embed", "stack"])
def test_bf16_is_as_good_as_merging(op):
    """Error against float64 at most 1.5 x that of the merged kernel, plus one ulp."""
    modules = {
        "dot": (nn.Dense(64), programs.normal(0, 16, 48)),
        "conv": (nn.Conv(32, (3, 3)), programs.normal(0, 2, 8, 8, 16)),
        "embed": (nn.Embed(40, 64), jnp.arange(40)),
        "stack": (nn.DenseGeneral((4, 16)), programs.normal(0, 16, 48)),
    }
    module, x = modules[op]
    low = lambda t: jax.tree.map(
        lambda v: v.astype(jnp.bfloat16) if v.dtype == jnp.float32 else v, t
    )
    params, x = low(module.init(jax.random.key(1), x)), low(x)
    fn = lambda params, x: module.apply(params, x)
    kernels = lorax.discover(fn, params, x)
    target = lorax.Target(".*(kernel|embedding)", rank=4, alpha=4)
    adapters, params = lorax.init(jax.random.key(0), params, target, kernels)
    adapters = programs.perturbed(adapters, 0.1)
    (path,) = adapters
    with jax.enable_x64(True):
        double = lambda t: jax.tree.map(
            lambda v: (
                v.astype(jnp.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v
            ),
            t,
        )
        module64 = module.clone(dtype=jnp.float64)
        exact = np.asarray(
            module64.apply(lorax.merge(double(adapters), double(params)), double(x))
        )
    merged = jax.jit(programs.definition(fn))(adapters, params, x)
    adapted = jax.jit(lorax.adapt(fn, on_merge="error"))(adapters, params, x)
    assert adapted.dtype == merged.dtype == jnp.bfloat16
    assert adapters[path].a.dtype == jnp.float32
    error = lambda y: np.abs(np.asarray(y, np.float64) - exact)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact).max())) - 7)
    assert error(adapted).max() <= 1.5 * error(merged).max() + ulp
    rms = lambda e: np.sqrt(np.mean(e**2))
    assert rms(error(adapted)) <= 1.5 * rms(error(merged)) + ulp / 4


def test_gradients_of_bf16_base_are_float32():
    params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
    adapters, params = lorax.init(jax.random.key(0), params, lorax.Target("w", rank=2))
    fn = lambda params, x: jnp.sum((x @ params["w"]).astype(jnp.float32))
    grads = jax.grad(lorax.adapt(fn))(adapters, params, jnp.ones((2, 4), jnp.bfloat16))
    assert grads["w"].a.dtype == grads["w"].b.dtype == jnp.float32
    np.testing.assert_array_equal(grads["w"].a, 0)  # b = 0: exactly zero


def test_at_b_zero_the_value_is_the_base_bit_for_bit():
    program = programs.PROGRAMS["attention"]()
    kernels = lorax.discover(program.fn, program.params, *program.args)
    adapters, params = lorax.init(
        jax.random.key(0), program.params, program.targets, kernels
    )
    got = lorax.adapt(program.fn)(adapters, params, *program.args)
    np.testing.assert_array_equal(got, program.fn(params, *program.args))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices (see conftest)")
def sharded_program(check_vma):
    """Tensor-parallel and fsdp kernels: partial products summed, kernels gathered."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    specs = {
        "up": P(None, "tensor"),
        "down": P("tensor", None),
        "fsdp": P("data", None),
    }

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, P("data", None)),
        out_specs=P("data", None),
        check_vma=check_vma,
    )
    def forward(params, x):
        h = jnp.tanh(x @ params["up"])
        x = x + jax.lax.psum(h @ params["down"], "tensor")
        whole = jax.lax.all_gather(params["fsdp"], "data", axis=0, tiled=True)
        return jnp.tanh(x @ whole)

    fn = lambda params, x: jnp.sum(forward(params, x) ** 2)
    params = {
        "up": programs.normal(1, 4, 6),
        "down": programs.normal(2, 6, 4),
        "fsdp": programs.normal(3, 4, 5),
    }
    return programs.Program(fn, params, (programs.normal(0, 8, 4),))


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, adapter):
    """DoRA's norm is of the whole column although a shard holds only some inputs."""
    fn, params, args, _ = sharded_program(check_vma)
    kernels = lorax.discover(fn, params, *args)
    assert {path: k.op for path, k in kernels.items()} == dict.fromkeys(params, "dot")
    target = lorax.Target(".*", rank=2, adapter=adapter)
    adapters, params = lorax.init(jax.random.key(0), params, target, kernels)
    adapters = programs.perturbed(adapters)
    adapted = lorax.adapt(fn, on_merge="error")
    got = programs.loss_and_grad(adapted, adapters, params, *args)
    want = programs.loss_and_grad(programs.definition(fn), adapters, params, *args)
    assert_close(got, want)


def with_dropout(program, rate):
    kernels = lorax.discover(program.fn, program.params, *program.args)
    targets = [lorax.Target(".*kernel", rank=2, dropout=rate)]
    adapters, params = lorax.init(jax.random.key(0), program.params, targets, kernels)
    return programs.perturbed(adapters), params


def test_dropout_needs_a_key_and_follows_it():
    program = programs.PROGRAMS["dense"]()
    adapters, params = with_dropout(program, 0.5)
    adapted = lorax.adapt(program.fn, on_merge="error")
    plain = adapted(adapters, params, *program.args)
    drop = lambda seed: adapted(
        adapters, params, *program.args, lora_key=jax.random.key(seed)
    )
    want = programs.definition(program.fn)(adapters, params, *program.args)
    np.testing.assert_allclose(plain, want, rtol=1e-5)
    assert drop(0) == drop(0) and drop(0) != drop(1) and drop(0) != plain


def test_dropout_acts_on_the_branch_input_only():
    # identity base: y - x = scale * dropped(x) @ a @ b, each input kept with 1 - rate
    params = {"w": jnp.zeros((64, 64))}
    adapter = lorax.Lora(
        jnp.eye(64), jnp.eye(64), 1.0, lorax.Axes((0,), (1,)), dropout=0.25
    )
    fn = lambda params, x: x @ params["w"]
    x = jnp.ones((100, 64))
    y = lorax.adapt(fn)({"w": adapter}, params, x, lora_key=jax.random.key(0))
    values, counts = np.unique(np.asarray(y), return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 0.75], rtol=1e-6)
    assert abs(counts[0] / y.size - 0.25) < 0.02


def masks(fn, params, x, **adapter):
    """The dropout masks of an adapter that copies its input: zeros where dropped."""
    lora = lorax.Lora(
        jnp.broadcast_to(jnp.eye(16), params.shape),
        jnp.broadcast_to(jnp.eye(16), params.shape),
        1.0,
        dropout=0.5,
        **adapter,
    )
    key = jax.random.key(3)
    call = lambda lora: lorax.adapt(fn)({"w": lora}, {"w": params}, x, lora_key=key)
    return call, lora


def test_dropout_masks_differ_between_scanned_layers_and_replay_under_remat():
    def fn(params, x, remat):
        layer = lambda _, w: (_, x @ w)
        layer = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(layer, 0.0, params["w"])[1]  # [layer, 8, 16]

    stack, axes = jnp.zeros((3, 16, 16)), lorax.Axes((1,), (2,), (0,))
    x = jnp.ones((8, 16))
    call, lora = masks(lambda p, x: fn(p, x, False), stack, x, axes=axes)
    first, second, third = np.asarray(call(lora)) == 0
    assert (first != second).any() and (second != third).any()

    # the gradient of b sees the mask of the forward pass: d sum(y^2) / d b by hand
    call, lora = masks(lambda p, x: fn(p, x, True), stack, x, axes=axes)
    grads = jax.jit(jax.grad(lambda lora: jnp.sum(call(lora) ** 2)))(lora)
    y = np.asarray(call(lora), np.float64)  # = dropped x, as a = b = identity
    want = 2 * np.einsum("lti,lto->lio", y, y)
    np.testing.assert_allclose(grads.b, want, rtol=1e-5)


def test_dropout_masks_differ_between_uses_and_in_loops():
    def fn(params, x):
        steps = jax.lax.fori_loop(
            0, 3, lambda i, y: y.at[i].set(x @ params["w"]), jnp.zeros((3, 8, 16))
        )
        return jnp.stack([x @ params["w"], x @ params["w"], *steps])

    call, lora = masks(
        fn, jnp.zeros((16, 16)), jnp.ones((8, 16)), axes=lorax.Axes((0,), (1,))
    )
    zeros = [tuple(m.ravel()) for m in np.asarray(call(lora)) == 0]
    assert len(set(zeros)) == 5


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x @ jnp.sin(w),
        lambda w, x: x @ (w * jnp.arange(4.0)[:, None]),
        lambda w, x: x @ (w @ w.T),
        lambda w, x: x @ w[::-1],
        lambda w, x: x @ w + jnp.sum(w**2),
        lambda w, x: x @ w.reshape(-1).reshape(4, 4),
        lambda w, x: jnp.einsum("ti,to->tio", x, x).reshape(2, -1) @ w.reshape(-1),
        lambda w, x: jax.vmap(lambda v: v @ w.T, 1, 1)(x.T).T,
    ],
)
def test_anything_else_merges_there_warns_once_and_is_right(use):
    fn = lambda params, x: jnp.sum(jnp.tanh(use(params["w"], x)))
    params, x = {"w": programs.normal(1, 4, 4)}, programs.normal(0, 2, 4)
    adapters, params = lorax.init(jax.random.key(0), params, lorax.Target("w", rank=2))
    adapters = programs.perturbed(adapters)
    adapted = lorax.adapt(fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = jax.value_and_grad(adapted)(adapters, params, x)
        first = len(caught)
        adapted(adapters, params, x)
    assert len(caught) == first  # once
    assert all(w.category is lorax.MergeWarning for w in caught)
    assert_close(got, jax.value_and_grad(programs.definition(fn))(adapters, params, x))
    if caught:
        with pytest.raises(ValueError, match=r"^w: .*merged there.*on_merge='warn'"):
            lorax.adapt(fn, on_merge="error")(adapters, params, x)


def test_a_merged_kernel_with_dropout_on_is_an_error():
    fn = lambda params, x: jnp.sum(x @ jnp.sin(params["w"]))
    params = {"w": jnp.ones((4, 4))}
    target = lorax.Target("w", rank=2, dropout=0.1)
    adapters, params = lorax.init(jax.random.key(0), params, target)
    adapted, x = lorax.adapt(fn), jnp.ones((2, 4))
    with pytest.warns(lorax.MergeWarning):
        adapted(adapters, params, x)
    with pytest.raises(ValueError, match="dropout acts on the input"):
        adapted(adapters, params, x, lora_key=jax.random.key(0))


def test_a_convolution_of_grouped_batches_merges():
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1,),
        padding="SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        batch_group_count=2,
    )
    params, x = {"kernel": programs.normal(1, 3, 6, 4)}, programs.normal(0, 4, 8, 6)
    fn = lambda params, x: jnp.sum(conv(x, params["kernel"]) ** 2)
    kernels = lorax.discover(fn, params, x)
    assert kernels["kernel"].op == "conv" and not kernels["kernel"].uses[0].fast
    adapters, params = lorax.init(
        jax.random.key(0), params, lorax.Target("kernel", rank=2), kernels
    )
    adapters = programs.perturbed(adapters)
    with pytest.warns(lorax.MergeWarning, match="conv_general_dilated"):
        got = jax.value_and_grad(lorax.adapt(fn))(adapters, params, x)
    assert_close(got, jax.value_and_grad(programs.definition(fn))(adapters, params, x))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices (see conftest)")
@pytest.mark.parametrize("name", ["attention", "kernel_on_the_left", "dense_general"])
def test_on_a_mesh_activations_keep_their_axes(name):
    """Under a mesh no reshape merges axes; values are the same as on one device."""
    program, _, adapters, params = setup(name)
    mesh = jax.make_mesh(
        (2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    place = lambda tree, spec: jax.device_put(
        tree, jax.sharding.NamedSharding(mesh, spec)
    )
    spread = place(adapters, P()), place(params, P())
    rows = P("data") if program.args[0].shape[0] % 2 == 0 else P()
    args = [place(arg, rows) for arg in program.args]
    adapted = lorax.adapt(program.fn, on_merge="error")
    step = jax.jit(jax.value_and_grad(adapted))
    assert_close(step(*spread, *args), step(adapters, params, *program.args))
    text = lambda *given: jax.jit(adapted).lower(*given).as_text()
    negated = text(adapters, params, *program.args).count("stablehlo.negate")
    assert negated == 2 * len(adapters)  # the single-CPU form, of both factors
    assert "stablehlo.negate" not in text(*spread, *args)


def test_kernels_handed_back_by_loops_and_shards_are_not_merged():
    """Returned by a while loop, an outer scan, a shard; then used, with dropout on."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    def fn(params, x):
        same = jax.jit(lambda w: w)
        body = lambda state: (state[0] + 1, same(state[1]), x @ state[1])
        _, w, y = jax.lax.while_loop(lambda s: s[0] < 3, body, (0, params["w"], x))
        inner = lambda x, ws: jax.lax.scan(lambda x, w: (x @ w, w), x, ws)
        y, stack = jax.lax.scan(inner, y, params["v"])
        own = lambda w, x: (w, jnp.tanh(x @ w))
        own = jax.shard_map(own, mesh=mesh, in_specs=P(), out_specs=P())
        w, y = own(w, y)
        return y @ w @ stack[0, 1]

    params = {"w": programs.normal(1, 4, 4), "v": 0.5 * programs.normal(2, 2, 2, 4, 4)}
    x = programs.normal(0, 3, 4)
    kernels = lorax.discover(fn, params, x)
    assert all(use.fast for kernel in kernels.values() for use in kernel.uses)
    target = lorax.Target("[wv]", rank=2, dropout=0.5)
    adapters, params = lorax.init(jax.random.key(0), params, target, kernels)
    adapters = programs.perturbed(adapters)
    adapted = lorax.adapt(fn, on_merge="error")
    want = programs.definition(fn)(adapters, params, x)
    assert_close(adapted(adapters, params, x), want)
    dropped = adapted(adapters, params, x, lora_key=jax.random.key(1))
    assert float(jnp.abs(dropped - want).max()) > 1e-3


def test_eight_bit_operands_and_empty_batches():
    params = {"w": programs.normal(1, 4, 3)}
    adapters, params = lorax.init(jax.random.key(0), params, lorax.Target("w", rank=2))
    adapters = programs.perturbed(adapters)
    small = jnp.float8_e4m3fn
    fn = lambda params, x: jax.lax.dot(
        x.astype(small), params["w"].astype(small), preferred_element_type=jnp.float32
    )
    x = programs.normal(0, 5, 4)
    got = lorax.adapt(fn, on_merge="error")(adapters, params, x)
    exact = x @ lorax.merge(adapters, params)["w"]
    merged = programs.definition(fn)(adapters, params, x)
    assert got.dtype == jnp.float32
    assert jnp.abs(got - exact).max() <= 1.5 * jnp.abs(merged - exact).max()
    fn = lambda params, x: x @ params["w"]
    assert lorax.adapt(fn)(adapters, params, x[:0]).shape == (0, 3)
