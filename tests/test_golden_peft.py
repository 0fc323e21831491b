"""The same adapter in PEFT: equal outputs and gradients, for every layer both support.

PEFT's `lora_A.weight` is our `a` transposed and `lora_B.weight` our `b` transposed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests import programs

torch = pytest.importorskip("torch", reason="needs the golden extra: torch, peft")
peft = pytest.importorskip("peft", reason="needs the golden extra: torch, peft")

AXES_2D = lorax.Axes((0,), (1,))


def as_torch(array, *order):
    return torch.from_numpy(np.array(np.transpose(array, order or None)))


def reference(layer, x, kernel, a, b, config):
    """Value and factor gradients of sum(tanh(layer(x))^2) in PEFT."""
    model = torch.nn.Sequential()
    model.add_module("layer", layer)
    model = peft.get_peft_model(model, config)
    wrapped = model.base_model.model.layer
    with torch.no_grad():
        wrapped.base_layer.weight.copy_(kernel)
        embedding = isinstance(layer, torch.nn.Embedding)
        factors = (
            (wrapped.lora_embedding_A["default"], wrapped.lora_embedding_B["default"])
            if embedding
            else (wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight)
        )
        for factor, value in zip(factors, (a, b), strict=True):
            factor.copy_(value)
    loss = (model(x).tanh() ** 2).sum()
    loss.backward()
    return loss.item(), [f.grad.numpy() for f in factors], wrapped.scaling["default"]


def ours(fn, kernel, a, b, scale, axes, x):
    adapters = {"w": lorax.Lora(a, b, scale, axes)}
    loss = lambda params, x: jnp.sum(jnp.tanh(fn(params["w"], x)) ** 2)
    adapted = lorax.adapt(loss, on_merge="error")
    value, grads = jax.value_and_grad(adapted)(adapters, {"w": kernel}, x)
    return value, grads["w"]


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_linear(scaling):
    kernel, x = programs.normal(0, 6, 5), programs.normal(1, 4, 6)
    a, b = programs.normal(2, 6, 3), programs.normal(3, 3, 5)
    scale = lorax.Target("w", rank=3, alpha=7, scaling=scaling).scale
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["layer"],
        use_rslora=scaling == "rank_stabilized",
    )
    layer = torch.nn.Linear(6, 5, bias=False)
    value, grads, s = reference(
        layer, as_torch(x, 0, 1), as_torch(kernel), as_torch(a), as_torch(b), config
    )
    assert s == pytest.approx(scale, rel=1e-12)
    got, lora = ours(lambda w, x: x @ w, kernel, a, b, scale, AXES_2D, x)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(lora.a.T, grads[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lora.b.T, grads[1], rtol=1e-4, atol=1e-5)


def test_embedding():
    table, ids = programs.normal(0, 7, 5), jnp.array([3, 0, 6, 3])
    a, b = programs.normal(2, 7, 2), programs.normal(3, 2, 5)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["layer"])
    value, grads, s = reference(
        torch.nn.Embedding(7, 5),
        torch.tensor([3, 0, 6, 3]),
        as_torch(table, 0, 1),
        as_torch(a),
        as_torch(b),
        config,
    )
    got, lora = ours(lambda w, i: jnp.take(w, i, axis=0), table, a, b, s, AXES_2D, ids)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(lora.a.T, grads[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lora.b.T, grads[1], rtol=1e-4, atol=1e-5)


def test_convolution():
    kernel, x = programs.normal(0, 3, 3, 4, 5), programs.normal(1, 2, 6, 6, 4)
    a, b = programs.normal(2, 3, 3, 4, 2), programs.normal(3, 2, 5)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["layer"])
    value, grads, s = reference(
        torch.nn.Conv2d(4, 5, 3, stride=2, bias=False),
        as_torch(x, 0, 3, 1, 2),
        as_torch(kernel, 3, 2, 0, 1),
        as_torch(a, 3, 2, 0, 1),
        as_torch(b)[:, :, None, None],
        config,
    )
    conv = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got, lora = ours(conv, kernel, a, b, s, lorax.Axes((0, 1, 2), (3,)), x)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    want = grads[0].transpose(2, 3, 1, 0), grads[1][:, :, 0, 0].T
    np.testing.assert_allclose(lora.a, want[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lora.b, want[1], rtol=1e-4, atol=1e-4)


def test_the_standard_init_has_the_bounds_of_pefts():
    layer = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(50, 400)),
        peft.LoraConfig(r=40, target_modules=["0"]),
    ).base_model.model[0]
    theirs = layer.lora_A["default"].weight.detach().numpy()
    adapters, _ = lorax.init(
        jax.random.key(0), {"w": jnp.zeros((50, 400))}, lorax.Target("w", rank=40)
    )
    a = np.asarray(adapters["w"].a)
    bound = 1 / np.sqrt(50)
    for draw in (theirs, a):
        assert np.abs(draw).max() <= bound
        assert draw.std() == pytest.approx(bound / np.sqrt(3), rel=0.03)


def test_dora():
    """PEFT detaches the norm, as we do by default; the bias is not scaled."""
    kernel, x = programs.normal(0, 6, 5), programs.normal(1, 4, 6)
    a, b = programs.normal(2, 6, 3), programs.normal(3, 3, 5)
    magnitude, bias = 1 + programs.normal(4, 5) / 4, programs.normal(5, 5)
    layer = torch.nn.Linear(6, 5)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["layer"], use_dora=True)
    model = torch.nn.Sequential()
    model.add_module("layer", layer)
    model = peft.get_peft_model(model, config)
    wrapped = model.base_model.model.layer
    theirs = wrapped.lora_magnitude_vector["default"].weight
    factors = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight, theirs
    with torch.no_grad():
        wrapped.base_layer.weight.copy_(as_torch(kernel))
        wrapped.base_layer.bias.copy_(as_torch(bias))
        for factor, value in zip(factors, (a, b, magnitude), strict=True):
            factor.copy_(as_torch(value))
    loss = (model(as_torch(x, 0, 1)).tanh() ** 2).sum()
    loss.backward()

    adapters = {"w": lorax.Dora(a, b, magnitude, 7 / 3, AXES_2D)}
    fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"] + bias) ** 2)
    adapted = lorax.adapt(fn, on_merge="error")
    value, grads = jax.value_and_grad(adapted)(adapters, {"w": kernel}, x)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    for ours_, theirs in zip(jax.tree.leaves(grads), factors, strict=True):
        np.testing.assert_allclose(ours_.T, theirs.grad.numpy(), rtol=1e-4, atol=1e-5)
