"""DoRA: numbers by hand, the equations in numpy, and every way a kernel is used."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.adapters import dora
from tests import programs, programs_nnx  # noqa: F401 (it registers its own)
from tests.test_adapt import assert_close
from tests.test_protocols import compiled

KEY = jax.random.key(0)
AXES = lorax.Axes((0,), (1,))
# no gain factors out of kernels concatenated or padded along inputs, or added
MERGED = {"views", "padded_and_flipped", "sums_of_kernels"}


def adapted_to(program, **fields):
    """Perturbed DoRA adapters for every kernel of a program."""
    targets = [
        dataclasses.replace(t, adapter="dora", **fields) for t in program.targets
    ]
    kernels = lorax.discover(program.fn, program.params, *program.args)
    adapters, params = lorax.init(KEY, program.params, targets, kernels)
    return programs.perturbed(adapters), params


def by_hand(w, a, b, s, m):
    """(W0 + s a b) m / |W0 + s a b|, in numpy float64."""
    v = np.asarray(w, np.float64) + s * np.asarray(a, np.float64) @ np.asarray(b)
    return v * np.asarray(m) / np.sqrt((v**2).sum(0))


def test_one_kernel_by_hand():
    """V = [[3, 0], [4, 2]] has the column norms 5 and 2."""
    kernel = jnp.array([[3.0, 0.0], [0.0, 2.0]])
    a, b = jnp.array([[0.0], [1.0]]), jnp.array([[2.0, 0.0]])
    adapter = lorax.Dora(a, b, jnp.array([10.0, 1.0]), 2.0, AXES)
    np.testing.assert_allclose(adapter.norm(kernel), [5, 2], rtol=1e-6)
    np.testing.assert_allclose(adapter.gain(kernel), [2, 0.5], rtol=1e-6)
    merged = lorax.merge({"w": adapter}, {"w": kernel})["w"]
    np.testing.assert_allclose(merged, [[6, 0], [8, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    "shape,axes",
    [
        ((7, 5), lorax.Axes((0,), (1,))),
        ((3, 7, 5), lorax.Axes((1,), (2,), (0,))),
        ((4, 7, 2), lorax.Axes((1,), (0, 2))),
        ((4, 7, 2), lorax.Axes((1,), (2, 0))),
        ((3, 2, 4, 6), lorax.Axes((0, 1, 2), (3,))),
        ((5, 3, 6, 2), lorax.Axes((2,), (0,), (3, 1))),
    ],
)
def test_the_norm_from_factors_is_that_of_the_dense_kernel(shape, axes):
    in_, out, batch = axes.sizes(shape)
    kernel = programs.normal(0, *shape)
    a, b = programs.normal(1, *batch, *in_, 2), programs.normal(2, *batch, 2, *out)
    lora = lorax.Lora(a, b, 1.0, axes)
    dense = np.asarray(kernel, np.float64) + np.asarray(lora.delta(kernel))
    want = np.sqrt(
        (dense.transpose(axes.order) ** 2).sum(
            tuple(range(len(batch), len(batch) + len(in_)))
        )
    )
    got = dora.column_norm(kernel, a, b, axes)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_cancelled_column_stays_finite():
    kernel = programs.normal(0, 50, 3)
    for left in (1e-3, 1e-7, 0.0):
        a, b = kernel[:, :1], jnp.array([[left - 1.0, 0.0, 0.0]])
        adapter = lorax.Dora(a, b, jnp.ones(3), 1.0, AXES)
        loss = lambda ad, k: jnp.sum(ad["w"].merge(k) ** 2)
        value, grads = jax.value_and_grad(loss)({"w": adapter}, kernel)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    zero = lorax.Dora(jnp.ones((4, 1)), jnp.zeros((1, 3)), jnp.zeros(3), 1.0, AXES)
    np.testing.assert_array_equal(zero.merge(jnp.zeros((4, 3))), 0)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_are_those_of_the_equations(detach):
    """dV = (m/c) dW, without the projection (I - v v^T) if the norm is detached."""
    w, x = programs.normal(0, 6, 5), programs.normal(1, 4, 6)
    a, b, m = (
        programs.normal(2, 6, 2),
        programs.normal(3, 2, 5),
        1 + programs.normal(4, 5),
    )
    target = np.asarray(programs.normal(5, 4, 5), np.float64)
    adapter = lorax.Dora(a, b, m, 0.7, AXES, detach_norm=detach)
    loss = lambda params, x: 0.5 * jnp.sum((x @ params["w"] - target) ** 2)
    grads = jax.grad(lorax.adapt(loss, on_merge="error"))({"w": adapter}, {"w": w}, x)[
        "w"
    ]

    a, b, m, w, x = (np.asarray(v, np.float64) for v in (a, b, m, w, x))
    v = w + 0.7 * a @ b
    c = np.sqrt((v**2).sum(0))
    dw = x.T @ (x @ (v * m / c) - target)
    dm = (dw * v / c).sum(0)
    dv = dw * m / c
    if not detach:
        dv -= v / c * ((v / c) * dv).sum(0)
    np.testing.assert_allclose(grads.magnitude, dm, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(grads.a, 0.7 * dv @ b.T, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(grads.b, 0.7 * a.T @ dv, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in programs.PROGRAMS if n not in MERGED])
def test_adapt_is_merge_then_apply(name):
    program = programs.PROGRAMS[name]()
    adapters, params = adapted_to(program)
    sides = lorax.adapt(program.fn, on_merge="error"), programs.definition(program.fn)
    both = lambda *args: [jax.value_and_grad(side)(*args) for side in sides]
    assert_close(*compiled(both, adapters, params, *program.args))


@pytest.mark.parametrize("name", sorted(MERGED))
def test_where_the_gain_does_not_factor_out_the_kernel_is_merged(name):
    program = programs.PROGRAMS[name]()
    adapters, params = adapted_to(program)
    adapted = lorax.adapt(program.fn)
    with pytest.warns(lorax.MergeWarning):
        got = adapted(adapters, params, *program.args)
    want = programs.definition(program.fn)(adapters, params, *program.args)
    assert_close(got, want)


@pytest.mark.parametrize("detach", [True, False])
def test_forward_mode_and_second_derivatives(detach):
    """The rule that reads the gain's gradient off the result is exact."""
    fn = lambda params, x: jnp.sum(
        jnp.tanh(jnp.tanh(x @ params["w1"] + params["bias"]) @ params["w2"])
    )
    params = {"w1": programs.normal(1, 3, 4), "w2": programs.normal(2, 4, 2)}
    params["bias"] = programs.normal(3, 4)
    x = programs.normal(0, 5, 3)
    target = lorax.Target("w.", rank=1, adapter="dora", options={"detach_norm": detach})
    adapters, _ = lorax.init(KEY, params, target)
    adapters = programs.perturbed(adapters)
    sides = lorax.adapt(fn, on_merge="error"), programs.definition(fn)
    both = lambda ad: [
        (jax.hessian(s)(ad, params, x), jax.jacfwd(s)(ad, params, x)) for s in sides
    ]
    got, want = compiled(both, adapters)
    assert_close(got, want)


def test_the_norm_is_computed_once_outside_every_loop():
    """In a scanned, rematerialised stack no loop body squares a kernel."""
    program = programs.PROGRAMS["scanned_remat"]()
    adapters, params = adapted_to(program)
    loss = jax.grad(lorax.adapt(program.fn, on_merge="error"))
    jaxpr = jax.make_jaxpr(loss)(adapters, params, *program.args).jaxpr
    sizes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 3}
    layers = {shape[1:] for shape in sizes}

    def squares(jaxpr, shapes):
        found = sum(
            eqn.primitive.name in ("integer_pow", "square")
            and eqn.invars[0].aval.shape in shapes
            for eqn in jaxpr.eqns
        )
        inner = [
            getattr(v, "jaxpr", v)
            for eqn in jaxpr.eqns
            for v in eqn.params.values()
            if hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ]
        return found + sum(squares(j, shapes) for j in inner)

    assert squares(jaxpr, sizes) == len(adapters)
    assert squares(jaxpr, layers) == 0


def test_dropout_drops_the_same_inputs_of_the_frozen_product():
    """y = x W0 + x~ W0 (m/c - 1) + s x~ a b m/c, with one mask for both."""
    w, x = programs.normal(0, 6, 5), jnp.ones((1, 6))
    a, b, m = (
        programs.normal(2, 6, 2),
        programs.normal(3, 2, 5),
        1 + programs.normal(4, 5),
    )
    adapter = lorax.Dora(a, b, m, 0.7, AXES, dropout=0.5)
    fn = lambda params, x: x @ params["w"]
    adapted = jax.jit(lorax.adapt(fn, on_merge="error"))
    seen = set()
    c = np.asarray(adapter.norm(w))
    for i in range(8):
        y = adapted({"w": adapter}, {"w": w}, x, lora_key=jax.random.key(i))
        fits = []
        for mask in np.ndindex(*(2,) * 6):
            kept = 2.0 * np.array(mask)[None]
            want = x @ w + kept @ w * (m / c - 1) + 0.7 * kept @ a @ b * m / c
            fits += [mask] * np.allclose(y, want, atol=1e-4)
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 2


def test_dropout_of_a_tied_use():
    program = programs.PROGRAMS["tied_embedding"]()
    adapters, params = adapted_to(program, dropout=0.5)
    adapted = jax.jit(lorax.adapt(program.fn, on_merge="error"))
    call = functools.partial(adapted, adapters, params, *program.args)
    one, again, other = (call(lora_key=jax.random.key(i)) for i in (0, 0, 1))
    assert one == again != other
    assert np.isfinite(one)


def test_bfloat16_compute_keeps_the_norm_in_float32():
    w = (100 * programs.normal(0, 64, 5)).astype(jnp.bfloat16)
    a, b = programs.normal(1, 64, 2), programs.normal(2, 2, 5)
    adapter = lorax.Dora(a, b, jnp.ones(5), 1.0, AXES)
    want = by_hand(np.asarray(w, np.float32), a, b, 1.0, np.ones(5))
    assert adapter.gain(w).dtype == jnp.float32
    got = np.asarray(adapter.merge(w), np.float32)
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(
        adapter.norm(w),
        np.sqrt(((np.asarray(w, np.float32) + a @ b) ** 2).sum(0)),
        rtol=1e-5,
    )
