"""Mixtures of experts: the same adapter however they are written, at LoRA's cost."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import checkpoint
from lorax.selection import select
from tests import programs
from tests import programs_experts as experts
from tests.programs_experts import CHOICE, FORMS, D, E, F, T
from tests.test_adapt import assert_close

EXPERTS = lorax.Target("up|down", rank=2, alpha=4, batch_axes=(0,))
KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time of these toys would go into optimising their programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def adapters_of(form, target=EXPERTS):
    params, x = experts.params(), experts.tokens()
    kernels = lorax.discover(FORMS[form], params, x)
    return programs.perturbed(lorax.init(KEY, params, target, kernels)[0])


@functools.cache
def merged_then_applied():
    fn = programs.definition(FORMS["ragged"])
    params, x = experts.params(), experts.tokens()
    return programs.loss_and_grad(fn, adapters_of("ragged"), params, x)


def by_hand(adapters, params, x):
    """Every token through its expert's merged kernels, in numpy's float64."""
    merged = {}
    for path, adapter in adapters.items():
        a, b = (np.asarray(leaf, np.float64) for leaf in (adapter.a, adapter.b))
        merged[path] = np.asarray(params[path]) + adapter.scale * a @ b
    rows = [
        np.tanh(np.asarray(row, np.float64) @ merged["up"][e]) @ merged["down"][e]
        for row, e in zip(x, CHOICE)
    ]
    return np.sin(rows).sum()


@pytest.mark.parametrize("form", FORMS)
def test_one_adapter_and_one_value_in_every_form(form):
    params, x = experts.params(), experts.tokens()
    adapters, wanted = adapters_of(form), adapters_of("ragged")
    assert adapters["up"].axes == lorax.Axes((1,), (2,), (0,))
    assert adapters["up"].a.shape == (E, D, 2) and adapters["up"].b.shape == (E, 2, F)
    jax.tree.map(np.testing.assert_array_equal, adapters, wanted)  # static fields too
    adapted = lorax.adapt(FORMS[form], on_merge="error")
    got = programs.loss_and_grad(adapted, adapters, params, x)
    assert_close(got, merged_then_applied())
    np.testing.assert_allclose(got[0], by_hand(adapters, params, x), rtol=1e-5)


@pytest.mark.parametrize("adapter", ["dora", "adalora"])
@pytest.mark.parametrize("form", ["read_and_summed", "vmapped", "by_several_indices"])
def test_other_adapters_of_experts(form, adapter):
    target = lorax.Target("up|down", rank=2, batch_axes=(0,), adapter=adapter)
    params, x = experts.params(), experts.tokens()
    adapters = adapters_of(form, target)
    adapted = lorax.adapt(FORMS[form], on_merge="error")
    got = programs.loss_and_grad(adapted, adapters, params, x)
    want = programs.loss_and_grad(programs.definition(FORMS[form]), adapters, params, x)
    assert_close(got, want)


def test_dropout_of_experts_has_the_mean_of_none():
    params, x = experts.params(), experts.tokens()
    target = lorax.Target("up", rank=2, batch_axes=(0,), dropout=0.5)
    adapters = adapters_of("read_and_summed", target)
    fn = lambda p, x: jnp.einsum("td,edf->tef", x, p["up"])
    adapted = jax.jit(lorax.adapt(fn, on_merge="error"))
    keys = jax.random.split(jax.random.key(3), 2000)
    drawn = jax.vmap(lambda key: adapted(adapters, params, x, lora_key=key))(keys)
    error = np.abs(drawn.mean(0) - adapted(adapters, params, x))
    assert (error < 5 * drawn.std(0) / math.sqrt(2000) + 1e-6).all()
    assert drawn.std(0).min() > 0


def dots(jaxpr, trips=1):
    """(FLOPs, size of the result) of every product, inner bodies included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((read, _), _) = eqn.params["dimension_numbers"]
            out = math.prod(eqn.outvars[0].aval.shape)
            width = math.prod(eqn.invars[0].aval.shape[d] for d in read)
            yield trips * 2 * out * width, out
        inner = trips * eqn.params.get("length", 1)
        for value in eqn.params.values():
            for body in value if isinstance(value, tuple) else [value]:
                if hasattr(body, "jaxpr") or hasattr(body, "eqns"):
                    yield from dots(getattr(body, "jaxpr", body), inner)


@pytest.mark.parametrize(
    "form", ["read_and_summed", "kernel_first", "vmapped", "scanned"]
)
def test_the_cost_is_that_of_lora(form):
    """No gradient of a kernel's size, and three thin products per forward one."""
    params, x, rank = experts.params(), experts.tokens(), 2
    adapters = adapters_of(form)
    grad = jax.grad(lorax.adapt(FORMS[form], on_merge="error"))
    found = [*dots(jax.make_jaxpr(grad)(adapters, params, x).jaxpr)]
    sizes = [size for _, size in found]
    assert not {D * F, E * D * F, T * D * F, 2 * T * D * F} & {*sizes}
    frozen = jax.make_jaxpr(jax.grad(FORMS[form], argnums=1))(params, x).jaxpr
    thin = 2 * T * E * rank * 2 * (D + F)  # both kernels, every expert on every token
    assert sum(f for f, _ in found) <= sum(f for f, _ in dots(frozen)) + 3 * thin


def test_checkpoints_pass_between_forms(tmp_path):
    params, x = experts.params(), experts.tokens()
    adapters = adapters_of("read_and_summed")
    checkpoint.save_adapters(tmp_path / "set", adapters, params)
    template = adapters_of("scanned")
    loaded = checkpoint.load_adapters(tmp_path / "set", template, params)
    got = lorax.adapt(FORMS["capacity"])(loaded, params, x)
    want = lorax.adapt(FORMS["read_and_summed"])(adapters, params, x)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_kernels_taken_by_index_are_a_batch_without_being_told():
    params, x = experts.params(), experts.tokens()
    for form in (name for name in FORMS if name.startswith("by_")):
        kernels = lorax.discover(FORMS[form], params, x)
        for path in params:
            assert kernels[path].axes == lorax.Axes((1,), (2,), (0,)), form
            assert [use.op for use in kernels[path].uses] == ["dot"]
            assert all(use.fast for use in kernels[path].uses)
        chosen = select(params, lorax.Target("all-linear", rank=2), kernels)
        assert "up" in chosen


def lookups():
    """Tables whose rows are looked up: [vocabulary, width], however they are used."""
    ids, other = jnp.array([[0, 3, 6], [1, 1, 5]]), jnp.ones((4, 5))
    table = {"w": programs.normal(1, 7, 4)}
    yield "returned", table, lambda p: p["w"][ids]
    yield "added", table, lambda p: jnp.tanh(p["w"][ids] + 1)
    yield "scaled and cast", table, lambda p: (2.0 * p["w"])[ids].astype("float32").T
    yield "a constant", table, lambda p: jnp.tanh(p["w"][ids]) @ other
    yield "one by one", table, lambda p: jnp.sin(jax.vmap(lambda i: p["w"][i])(ids[0]))
    yield "into a dot", table, lambda p: p["w"][ids] @ other
    yield "scores", table, lambda p: jnp.einsum("bqd,bkd->bqk", *[p["w"][ids]] * 2)
    user = lambda p: jnp.einsum("bd,bd->b", p["w"][ids[0]], p["v"][ids[1]])
    yield "factorisation", table | {"v": programs.normal(2, 6, 4)}, user
    kernel = lambda p: p["w"][ids] @ p["v"]
    yield "into a kernel", table | {"v": programs.normal(2, 4, 5)}, kernel
    heads = {"w": programs.normal(1, 7, 2, 4)}
    relative = lambda p: jnp.einsum("thk,hk->th", p["w"][ids[0]], jnp.ones((2, 4)))
    yield "of heads", heads, relative


@pytest.mark.parametrize("case", [*lookups()], ids=lambda case: case[0])
def test_rows_of_an_embedding_are_still_a_lookup(case):
    _, params, fn = case
    kernels = lorax.discover(lambda p: jnp.sum(jnp.sin(fn(p))), params)
    of = kernels["w"]
    assert of.op == "gather" and of.uses[0].fast
    assert of.axes == lorax.Axes((0,), tuple(range(1, len(of.shape))))
    assert kernels.get("v", of).op == (
        "dot" if case[0] == "into a kernel" else "gather"
    )
    loss = lambda p: jnp.sum(jnp.sin(fn(p)))
    adapters, _ = lorax.init(KEY, params, lorax.Target(".*", rank=2), kernels)
    adapters = programs.perturbed(adapters)
    got = programs.loss_and_grad(lorax.adapt(loss, on_merge="error"), adapters, params)
    want = programs.loss_and_grad(programs.definition(loss), adapters, params)
    assert_close(got, want)


def test_layers_of_experts():
    """A stack of layers, each with its experts: both axes are batch axes."""

    def fn(p, x):
        def layer(x, w):
            h = jnp.stack([jnp.tanh(x), x, jnp.sin(x)], 1)  # [T, E, D]
            return x + jnp.einsum("ted,edf->tf", h, w), None

        return jnp.sum(jax.lax.scan(layer, x, p["w"])[0] ** 2)

    params, x = {"w": programs.normal(1, 2, E, D, D)}, experts.tokens()
    kernels = lorax.discover(fn, params, x)
    assert kernels["w"].axes == lorax.Axes((1, 2), (3,), (0,))
    for axes in ((1,), (-3,), (0, 1)):
        target = lorax.Target("w", rank=1, batch_axes=axes)
        adapters, _ = lorax.init(KEY, params, target, kernels)
        assert adapters["w"].axes == lorax.Axes((2,), (3,), (0, 1))
    adapters = programs.perturbed(adapters)
    got = programs.loss_and_grad(lorax.adapt(fn, on_merge="error"), adapters, params, x)
    assert_close(
        got, programs.loss_and_grad(programs.definition(fn), adapters, params, x)
    )


def test_heads_written_and_read_one_by_one():
    """A kernel absorbed into the queries: its outputs h, k are read head by head."""

    def fn(p, c):
        keys = jnp.einsum("sc,chk->shk", c, p["w"])
        absorbed = jnp.einsum("thk,chk->thc", jnp.sin(keys), p["w"])
        return jnp.sum(jnp.tanh(absorbed) ** 2)

    params, x = {"w": programs.normal(1, 4, 2, 3)}, programs.normal(0, 5, 4)
    kernels = lorax.discover(fn, params, x)
    assert all(use.fast for use in kernels["w"].uses) and not kernels["w"].conflicts
    with pytest.warns(lorax.TargetWarning, match="axis 1 is written here and batched"):
        adapters, _ = lorax.init(KEY, params, lorax.Target("w", rank=2), kernels)
    adapters = programs.perturbed(adapters)
    got = programs.loss_and_grad(lorax.adapt(fn, on_merge="error"), adapters, params, x)
    want = programs.loss_and_grad(programs.definition(fn), adapters, params, x)
    assert_close(got, want)


def test_without_discover_the_batch_axes_say_how_a_leaf_is_read():
    params = experts.params()
    target = lorax.Target("up", rank=2, batch_axes=(-3,))
    ((_, kernel),) = select(params, target).values()
    assert kernel.axes == lorax.Axes((1,), (2,), (0,))
    last = lorax.Target("up", rank=2, batch_axes=(2,))
    ((_, kernel),) = select(params, last).values()
    assert kernel.axes == lorax.Axes((0,), (1,), (2,))


@pytest.mark.parametrize("given", [0, "0", (0, 0), (0.0,), (True,), {0: 1}, (None,)])
def test_batch_axes_that_are_no_axes(given):
    with pytest.raises(ValueError, match="give a tuple of distinct axes"):
        lorax.Target("up", batch_axes=given)


def test_batch_axes_that_do_not_fit():
    params, x = experts.params(), experts.tokens()
    kernels = lorax.discover(FORMS["read_and_summed"], params, x)
    of = lambda *axes: lorax.Target("up", rank=2, batch_axes=axes)
    with pytest.raises(ValueError, match=r"up: batch_axes=\(3,\).*from -3 to 2"):
        lorax.init(KEY, params, of(3), kernels)
    with pytest.raises(ValueError, match=r"up: batch_axes=\(0, -3\).*distinct"):
        lorax.init(KEY, params, of(0, -3), kernels)
    with pytest.raises(ValueError, match="no axis to read"):
        lorax.init(KEY, params, of(1), kernels)
    with pytest.raises(ValueError, match="no axis to write"):
        lorax.init(KEY, params, of(0, 2), kernels)
    with pytest.raises(ValueError, match=r"rank=5 is above min\(in, out\) = 4"):
        lorax.init(KEY, params, lorax.Target("up", rank=5, batch_axes=(0,)), kernels)
    with pytest.raises(ValueError, match="adapter='full' has none"):
        lorax.Target("up", adapter="full", batch_axes=(0,))
    fn = lambda p, x: jax.lax.conv(x, p["w"], (1, 1), "SAME")
    images = {"w": jnp.ones((4, 3, 2, 2))}
    kernels = lorax.discover(fn, images, jnp.ones((1, 3, 5, 5)))
    with pytest.raises(ValueError, match="only the axes of a dot can be"):
        lorax.init(KEY, images, lorax.Target("w", rank=2, batch_axes=(2,)), kernels)


def test_a_sibling_that_batches_the_axis_gives_notice_once():
    params, x = experts.params(), experts.tokens()
    kernels = lorax.discover(FORMS["vmapped"], params, x)
    assert kernels["up"].axes.batch == () and kernels["down"].axes.batch == (0,)
    plain = lorax.Target("up|down", rank=2)
    with pytest.warns(lorax.TargetWarning) as caught:
        lorax.init(KEY, params, plain, kernels)
    (warning,) = caught
    text = str(warning.message)
    assert "up (3, 4, 5): axis 0 is written here and batched by down at" in text
    assert "batch_axes=(0,)" in text and warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorax.init(KEY, params, EXPERTS, kernels)
        meant = lorax.Target("up|down", rank=2, batch_axes=())
        adapters, _ = lorax.init(KEY, params, meant, kernels)
        assert adapters["up"].a.shape == (D, 2)
        elsewhere = {"attention": {"up": params["up"]}, "moe": {"down": params["down"]}}
        fn = lambda p, x: FORMS["vmapped"](p["attention"] | p["moe"], x)
        kernels = lorax.discover(fn, elsewhere, x)
        lorax.init(KEY, elsewhere, lorax.Target(".*", rank=2), kernels)
