"""Kernels inside functions with custom derivative rules."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests import programs
from tests.programs import Program, normal
from tests.test_adapt import assert_close

KEY = jax.random.key(0)


def program() -> Program:
    """Products with custom backward passes, with a bias and a cast inside."""

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array, bias: jax.Array) -> jax.Array:
        return 2 * jnp.einsum("td,fd->tf", x, w).astype(jnp.float32) + bias

    def forward(x: jax.Array, w: jax.Array, bias: jax.Array) -> Any:
        return product(x, w, bias), (x, w)

    def backward(kept: Any, g: jax.Array) -> Any:
        return 2 * g @ kept[1], 2 * g.T @ kept[0], g.sum(0)

    product.defvjp(forward, backward)

    @jax.custom_jvp
    def gated(x: jax.Array, w: jax.Array) -> jax.Array:
        return (jax.jit(jnp.matmul)(x, w.T) * jnp.tanh(x)).reshape(-1)

    @gated.defjvp
    def tangent(primals: Any, tangents: Any) -> Any:
        (x, w), (dx, dw) = primals, tangents
        slope = (dx @ w.T + x @ dw.T) * jnp.tanh(x)
        slope += x @ w.T * (1 - jnp.tanh(x) ** 2) * dx
        return gated(x, w), slope.reshape(-1)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(product(x, params["w1"], jnp.ones(6)))
        layer = lambda x, w: (gated(x, w).reshape(x.shape), None)
        return jnp.sum(jax.lax.scan(layer, x, params["w2"])[0] ** 2)

    params = {"w1": normal(1, 6, 4), "w2": normal(2, 3, 6, 6)}
    return Program(fn, params, (normal(0, 5, 4),))


def made(fn, params, *args, rank=2):
    kernels = lorax.discover(fn, params, *args)
    adapters, _ = lorax.init(KEY, params, lorax.Target("w.*", rank=rank), kernels)
    return kernels, programs.perturbed(adapters)


def test_a_body_linear_in_the_kernel_gets_the_branch():
    fn, params, args, _ = program()
    kernels, adapters = made(fn, params, *args)
    assert kernels["w1"].axes == lorax.Axes((1,), (0,))
    assert kernels["w2"].axes == lorax.Axes((2,), (1,), (0,))
    assert all(use.fast for kernel in kernels.values() for use in kernel.uses)
    adapted = lorax.adapt(fn, on_merge="error", custom_rules="branch")
    got = programs.loss_and_grad(adapted, adapters, params, *args)
    want = programs.loss_and_grad(programs.definition(fn), adapters, params, *args)
    assert_close(got, want)


def scaled_rule(rule):
    """x @ w with a backward pass that is `rule` times the derivative."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda r, g: (rule * g @ r[1].T, rule * r[0].T @ g),
    )
    return product


def test_the_rule_stays_for_the_frozen_kernel():
    """By hand: dx = 10 g W0^T from the rule plus g (s a b)^T from the branch."""
    product = scaled_rule(10.0)
    fn = lambda params, x: product(x, params["w"])
    params, x, g = {"w": normal(1, 4, 3)}, normal(0, 2, 4), normal(2, 2, 3)
    _, adapters = made(fn, params, x)
    adapted = lorax.adapt(fn, custom_rules="branch")
    y, pull = jax.vjp(lambda a, x: adapted(a, params, x), adapters, x)
    da, dx = pull(g)
    x, g, w = (np.asarray(v, np.float64) for v in (x, g, params["w"]))
    a, b = (np.asarray(v, np.float64) for v in (adapters["w"].a, adapters["w"].b))
    s = adapters["w"].scale
    np.testing.assert_allclose(y, x @ (w + s * a @ b), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, 10 * g @ w.T + g @ (s * a @ b).T, rtol=1e-5)
    np.testing.assert_allclose(da["w"].a, s * x.T @ g @ b.T, rtol=1e-5, atol=1e-5)


def test_no_gradient_of_the_kernels_size_is_left():
    product = scaled_rule(1.0)
    fn = lambda params, x: jnp.sum(jnp.sin(product(x, params["w"])))
    params, x = {"w": normal(1, 7, 5)}, normal(0, 3, 7)
    _, adapters = made(fn, params, x)
    sizes = {}
    for rule in ("branch", "merge"):
        adapted = lorax.adapt(fn, custom_rules=rule)
        if rule == "merge":
            with pytest.warns(lorax.MergeWarning):
                lowered = jax.jit(jax.grad(adapted)).lower(adapters, params, x)
        else:
            lowered = jax.jit(jax.grad(adapted)).lower(adapters, params, x)
        text = lowered.compile().as_text()
        sizes[rule] = len(re.findall(r"= f32\[(?:7,5|5,7)\]\S* dot\(", text))
    assert sizes["branch"] == 0 < sizes["merge"]


def test_a_rule_that_is_more_than_the_derivative_can_have_the_merged_kernel():
    product = scaled_rule(10.0)
    fn = lambda params, x: jnp.sum(jnp.tanh(product(x, params["w"])))
    params, x = {"w": normal(1, 4, 3)}, normal(0, 2, 4)
    _, adapters = made(fn, params, x)
    with pytest.warns(lorax.CustomRuleWarning, match="w: 'custom_vjp_call' at .*merge"):
        lorax.adapt(fn)(adapters, params, x)
    adapted = lorax.adapt(fn, custom_rules="merge")
    with pytest.warns(lorax.MergeWarning, match=r"w: 'custom_vjp_call' at .*test_cu"):
        got = jax.value_and_grad(adapted)(adapters, params, x)
    want = jax.value_and_grad(programs.definition(fn))(adapters, params, x)
    assert_close(got, want)
    with pytest.raises(ValueError, match="custom_rules='both'; choose"):
        lorax.adapt(fn, custom_rules="both")


@jax.custom_vjp
def straight_through(w):
    return jnp.round(w)


straight_through.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))


@jax.custom_vjp
def clipped(w):
    return w


clipped.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_vjp
def fused(x, w):
    return jnp.tanh(x @ w)


fused.defvjp(
    lambda x, w: (fused(x, w), (x, w, fused(x, w))),
    lambda r, g: ((g * (1 - r[2] ** 2)) @ r[1].T, r[0].T @ (g * (1 - r[2] ** 2))),
)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x @ straight_through(w),
        lambda x, w: x @ clipped(w),
        lambda x, w: fused(x, w),
    ],
    ids=["not linear", "about the kernel", "nonlinear after"],
)
def test_other_bodies_are_merged_and_keep_the_rule(use):
    fn = lambda params, x: jnp.sum(jnp.sin(use(x, params["w"])))
    params, x = {"w": normal(1, 4, 3)}, normal(0, 2, 4)
    kernel = lorax.discover(fn, params, x)["w"]
    assert [u.op for u in kernel.uses] == ["custom_vjp_call"] and kernel.axes is None
    adapters, _ = lorax.init(KEY, params, lorax.Target("w", rank=2))
    adapters = programs.perturbed(adapters)
    with pytest.warns(lorax.MergeWarning, match="custom_vjp_call"):
        got = jax.value_and_grad(lorax.adapt(fn, custom_rules="branch"))(
            adapters, params, x
        )
    want = jax.value_and_grad(programs.definition(fn))(adapters, params, x)
    assert_close(got, want)
