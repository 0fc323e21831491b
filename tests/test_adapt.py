"""adapt computes what merge defines, at the cost of hand-written LoRA."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax import interpret
from tests import programs, programs_nnx  # noqa: F401 (it registers its own)


def setup(name):
    program = programs.PROGRAMS[name]()
    kernels = lorax.discover(program.fn, program.params, *program.args)
    make = jax.jit(lambda p: lorax.init(jax.random.key(0), p, program.targets, kernels))
    adapters, params = make(program.params)
    return program, kernels, programs.perturbed(adapters), params


def assert_close(got, want, tolerance=1e-5):
    """Compares relative to the tree's norm: some gradients are zero by symmetry."""
    got, want = (jax.tree.leaves(tree) for tree in (got, want))
    assert [g.dtype for g in got] == [w.dtype for w in want]
    got, want = ([np.asarray(v, np.float64) for v in tree] for tree in (got, want))
    norm = np.sqrt(sum(np.sum(w**2) for w in want))
    for g, w in zip(got, want, strict=True):
        assert np.max(np.abs(g - w), initial=0) <= tolerance * norm


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_adapt_is_merge_then_apply_and_merges_nothing(name):
    program, kernels, adapters, params = setup(name)
    adapted = lorax.adapt(program.fn, on_merge="error")
    got = programs.loss_and_grad(adapted, adapters, params, *program.args)
    want = programs.loss_and_grad(
        programs.definition(program.fn), adapters, params, *program.args
    )
    assert_close(got, want)
    moved = abs(got[0] - jax.jit(program.fn)(params, *program.args))
    assert moved > 1e-3 * abs(got[0]), "the adapters did nothing"


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_adapt_is_fast_exactly_where_discover_says_so(name, monkeypatch):
    program, kernels, adapters, params = setup(name)
    fast = set()
    emit = interpret.Emitter.linear

    def spy(self, walker, use):
        results = emit(self, walker, use)
        if results is not None:
            where = walker.line(use.eqn)
            fast.update((path, use.op, where) for path in use.view.paths)
        return results

    monkeypatch.setattr(interpret.Emitter, "linear", spy)
    jax.eval_shape(lorax.adapt(program.fn), adapters, params, *program.args)
    said = {
        (path, use.op, use.source)
        for path in adapters
        for use in kernels[path].uses
        if use.fast
    }
    assert fast == said


def test_discover_counts_the_flops_of_every_trip():
    fn = lambda params, x: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w), None), x, params["w"]
    )[0]
    shapes = jax.ShapeDtypeStruct((5, 4, 4), jnp.float32)
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    kernel = lorax.discover(fn, {"w": shapes}, x)["w"]
    assert kernel.flops == 5 * 2 * 3 * 4 * 4
    assert kernel.axes == lorax.Axes((1,), (2,), (0,))


def test_discover_finds_the_output_head_whatever_wraps_it():
    def fn(params, x):
        body = lambda x, w: (x + jnp.tanh(x @ w), None)
        x = jax.lax.scan(body, x, params["blocks"])[0]
        x = jax.jit(lambda w, x: jax.nn.log_softmax(x @ w))(params["head"], x)
        return x[:, 0] @ x[:, 1]

    params = {"blocks": jnp.ones((3, 4, 4)), "head": jnp.ones((4, 2))}
    kernels = lorax.discover(fn, params, jnp.ones((5, 4)))
    assert [path for path, k in kernels.items() if k.head] == ["head"]


def test_discover_reports_uses_that_do_not_fit_each_other():
    def both(params, x):  # [in, h, d] read along in, then along h
        w = params["w"]
        return jnp.sum(jnp.einsum("ti,ihd->thd", x, w)) + jnp.sum(
            jnp.einsum("th,ihd->tid", x, w)
        )

    kernel = lorax.discover(both, {"w": jnp.ones((4, 4, 3))}, jnp.ones((2, 4)))["w"]
    assert kernel.axes == lorax.Axes((0,), (1, 2))
    (other,) = kernel.conflicts
    assert other.axes == lorax.Axes((1,), (0, 2))
    adapters, params = lorax.init(
        jax.random.key(0),
        {"w": programs.normal(0, 4, 4, 3)},
        lorax.Target("w", rank=2),
        {"w": kernel},
    )
    adapters = programs.perturbed(adapters)
    with pytest.warns(lorax.MergeWarning, match=r"w: 'dot_general'"):
        got = lorax.adapt(both)(adapters, params, jnp.ones((2, 4)))
    want = programs.definition(both)(adapters, params, jnp.ones((2, 4)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_arguments_reach_the_function_as_given_and_outputs_leave_as_they_are():
    seen = {}

    def fn(params, x, train, *, tag, size):
        seen.update(train=train, tag=tag, size=size, x=x)
        y = x @ params["w"]
        return {"y": y, "tag": tag, "none": None, "size": size, "count": params["n"]}

    params = {"w": jnp.ones((4, 3)), "n": jnp.int32(7)}
    adapters, params = lorax.init(jax.random.key(0), params, lorax.Target("w", rank=2))
    x = np.ones((2, 4), np.float32)
    out = lorax.adapt(fn)(adapters, params, x, True, tag="a", size=3)
    assert seen["train"] is True and seen["tag"] == "a" and seen["x"] is x
    assert out["tag"] == "a" and out["none"] is None and out["size"] == 3
    assert out["count"] == 7 and out["y"].shape == (2, 3)


def test_aux_mutable_collections_and_rngs():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    x, net = programs.normal(0, 8, 3), Net()
    variables = net.init(jax.random.key(0), x, False)

    def loss(params, stats, x, train, rngs):
        y, new = net.apply(
            {"params": params, "batch_stats": stats},
            x,
            train,
            mutable=["batch_stats"],
            rngs=rngs,
        )
        return jnp.sum(y**2), new["batch_stats"]

    params, stats = variables["params"], variables["batch_stats"]
    adapters, params = lorax.init(
        jax.random.key(0), params, lorax.Target(".*kernel", rank=2)
    )
    adapters = programs.perturbed(adapters)
    rngs = {"dropout": jax.random.key(5)}
    run = lambda fn: jax.value_and_grad(fn, has_aux=True)(
        adapters, params, stats, x, True, rngs
    )
    got = run(lorax.adapt(loss, on_merge="error"))
    assert_close(got, run(programs.definition(loss)))


def test_the_step_compiles_once_and_the_base_is_no_constant():
    params = {"w": jnp.ones((256, 256))}
    adapters, params = lorax.init(jax.random.key(0), params, lorax.Target("w", rank=2))
    loss = lorax.adapt(lambda params, x: jnp.sum((x @ params["w"]) ** 2))
    counted, traces = programs.counted(jax.grad(loss))
    step = jax.jit(counted)
    for scale in (1.0, 2.0):
        step(adapters, params, scale * jnp.ones((4, 256)))
    assert len(traces) == 1
    text = step.lower(adapters, params, jnp.ones((4, 256))).as_text()
    assert len(text) < 10_000  # the 256 x 256 numbers are not constants of the program
    assert "256x256" not in text.split("return")[-1]


def test_nnx_state_may_be_written_when_it_is_an_argument():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, rest, x):
        net = nnx.merge(graph, params, rest)
        y = net(x)
        return jnp.sum(y**2), nnx.state(net, nnx.BatchStat)

    x = programs.normal(0, 8, 4)
    target = lorax.Target(".*linear/kernel", rank=2)
    adapters, params = lorax.init(jax.random.key(0), params, target)
    adapters = programs.perturbed(adapters)
    fresh = lambda adapters, params, rest, x: programs.definition(fn)(
        adapters, params, jax.tree.map(jnp.asarray, rest), x
    )
    run = lambda fn: jax.jit(jax.value_and_grad(fn, has_aux=True))(
        adapters, params, rest, x
    )
    got, want = run(lorax.adapt(fn, on_merge="error")), run(fresh)
    assert_close(got, want)
    stats = jax.tree.leaves(got[0][1])
    assert any(float(jnp.abs(s).max()) > 0.01 for s in stats)


def test_a_module_in_place_of_its_state_is_refused():
    with pytest.raises(TypeError, match=r"an nnx module.*nnx\.split\(model\)"):
        lorax.discover(lambda m, x: m(x), nnx.Linear(4, 3, rngs=nnx.Rngs(0)), 1.0)


def test_jit_finds_the_arguments_of_an_adapted_function_by_name():
    def fn(params, x, train):
        return x @ params["w"] if train else x[:, :3]

    params = {"w": programs.normal(1, 4, 3)}
    adapters, params = lorax.init(jax.random.key(0), params, ("w", 2))
    adapted, x = lorax.adapt(fn), jnp.ones((2, 4))
    names = ["adapters", "params", "x", "train", "lora_key"]
    assert list(inspect.signature(adapted).parameters) == names
    step = jax.jit(adapted, static_argnames=("train",))
    np.testing.assert_array_equal(step(adapters, params, x, train=False), x[:, :3])
    np.testing.assert_allclose(step(adapters, params, x, train=True), x @ params["w"])
    with pytest.raises(ValueError, match="a parameter named 'lora_key'"):
        lorax.adapt(lambda params, lora_key: 0)
    with pytest.raises(TypeError, match="dict is not an adapter: the first argument"):
        lorax.merge({"layer": params}, params)
    with pytest.raises(TypeError, match="Lora is not an adapter"):
        lorax.merge(adapters["w"], params)
