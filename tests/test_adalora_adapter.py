"""AdaLoRA's parametrisation and its penalty, by hand and in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.adapters import orthogonal_penalty
from tests import programs

AXES = lorax.Axes((0,), (1,))


def triplets(batch=(), axes=AXES):
    return lorax.AdaLora(
        programs.normal(0, *batch, 6, 3),
        programs.normal(1, *batch, 3),
        programs.normal(2, *batch, 3, 5),
        0.5,
        axes,
    )


def distances(adapter):
    """|p^T p - I|_F and |q q^T - I|_F of every matrix, in numpy float64."""
    p = np.asarray(adapter.p, np.float64).reshape(-1, 6, 3)
    q = np.asarray(adapter.q, np.float64).reshape(-1, 3, 5)
    grams = [m.T @ m for m in p] + [m @ m.T for m in q]
    return np.array([np.linalg.norm(g - np.eye(3)) for g in grams])


def test_one_kernel_by_hand():
    """0.5 * [1, 2]^T 3 [1, 0, -1]."""
    adapter = lorax.AdaLora(
        jnp.array([[1.0], [2.0]]),
        jnp.array([3.0]),
        jnp.array([[1.0, 0, -1]]),
        0.5,
        AXES,
    )
    merged = lorax.merge({"w": adapter}, {"w": jnp.ones((2, 3))})["w"]
    np.testing.assert_array_equal(merged, [[2.5, 1, -0.5], [4, 1, -2]])


def test_the_standard_init_by_its_moments():
    target = lorax.Target("w", rank=50, adapter="adalora")
    adapters, _ = lorax.init(jax.random.key(0), {"w": jnp.ones((400, 300))}, target)
    p, lam, q = adapters["w"].p, adapters["w"].lam, adapters["w"].q
    assert not lam.any()
    for draw in (p, q):
        np.testing.assert_allclose([np.mean(draw), np.std(draw)], [0, 0.02], atol=4e-4)
    assert adapters["w"].scale == 16 / 50


@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_penalty_is_that_of_the_equations(batch):
    axes = lorax.Axes((1,), (2,), (0,)) if batch else AXES
    adapters = {
        "u": triplets(batch, axes),
        "v": lorax.Full(jnp.ones(3)),
        "w": triplets(batch, axes).replace(q=jnp.zeros((*batch, 3, 5))),
    }
    away = np.concatenate([distances(adapters["u"]), distances(adapters["w"])])
    got = orthogonal_penalty(adapters), orthogonal_penalty(adapters, "norm")
    matrices = len(away) // 2  # each has a p and a q
    want = [np.sum(away**2) / matrices, np.mean(away)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    twice = {**adapters, "x": adapters["u"], "y": adapters["w"]}
    np.testing.assert_allclose(
        [orthogonal_penalty(twice), orthogonal_penalty(twice, "norm")], got, rtol=1e-6
    )


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_at_exact_orthonormality_the_gradient_is_zero(form):
    adapter = lorax.AdaLora(jnp.eye(6, 3), jnp.ones(3), jnp.eye(3, 5), 1.0, AXES)
    value, grads = jax.value_and_grad(orthogonal_penalty)({"w": adapter}, form)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_the_penalty_without_an_adalora_is_zero_and_another_form_is_refused():
    assert orthogonal_penalty({"v": lorax.Full(jnp.ones(3))}, "norm") == 0
    with pytest.raises(ValueError, match="choose one of squared, norm"):
        orthogonal_penalty({}, "frobenius")


def test_unknown_options_and_inits_are_refused():
    init = lambda **fields: lorax.init(
        jax.random.key(0), {"w": jnp.ones((4, 4))}, lorax.Target("w", 2, **fields)
    )
    with pytest.raises(ValueError, match="init='xavier'; choose one of standard"):
        init(init="xavier")
    with pytest.raises(ValueError, match="has no option iters; it has none"):
        init(options={"iters": 3})
    with pytest.raises(ValueError, match="has no option iters; it has detach_norm"):
        init(adapter="dora", options=(("iters", 3),))
    with pytest.raises(ValueError, match=r"options=3; give pairs \(name, value\)"):
        init(options=3)


def test_weights_as_peft_has_them():
    """PEFT's SVDLinear, forward: lora_A is p^T, lora_B q^T, lora_E lam."""
    torch = pytest.importorskip("torch", reason="needs the golden extra: torch, peft")
    peft = pytest.importorskip("peft", reason="needs the golden extra: torch, peft")
    adapter, kernel, x = triplets(), programs.normal(3, 6, 5), programs.normal(4, 2, 6)
    config = peft.AdaLoraConfig(
        init_r=3, lora_alpha=1.5, target_modules=["0"], total_step=10
    )
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
    layer = model.base_model.model[0]
    wide = lambda array: torch.from_numpy(np.array(array))
    with torch.no_grad():
        layer.base_layer.weight.copy_(wide(kernel.T))
        layer.base_layer.bias.zero_()
        layer.lora_A["default"].copy_(wide(adapter.p.T))
        layer.lora_B["default"].copy_(wide(adapter.q.T))
        layer.lora_E["default"].copy_(wide(adapter.lam[:, None]))
        want = model(wide(x)).numpy()
    got = lorax.adapt(lambda params, x: x @ params["w"])(
        {"w": adapter}, {"w": kernel}, x
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # PEFT: rank + 1e-5
