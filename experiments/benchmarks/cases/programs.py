"""One loss in four ways: adapted, by hand, materialised, and without adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import lorax
from experiments.benchmarks.cases import gpt2_shaped as gpt2

Loss = Callable[..., jax.Array]

WHOLE = {"full": ".*", "none": "h_0/[qkv]/bias"}
"""Method without factors -> the leaves that it trains whole."""
MOVED = {"b": 0.02, "lam": 1.0}
"""Fields that start at zero -> the size of the noise added to them."""


class Case(NamedTuple):
    """A program with its inputs: `jax.grad(loss)(trained, params, tokens)`."""

    loss: Loss
    trained: Any  # what is differentiated
    params: Any
    tokens: jax.Array

    def step(self) -> Loss:
        """Returns a new value-and-gradient function, which no cache has seen."""

        def step(trained: Any, params: Any, batch: jax.Array) -> Any:
            return jax.value_and_grad(self.loss)(trained, params, batch)

        return step

    def inputs(self) -> tuple[Any, Any, jax.Array]:
        """Returns the arguments of a step."""
        return self.trained, self.params, self.tokens


class LoraDense(nn.Module):
    """Hand-written LoRA, with the factors in the collection `lora`."""

    features: int
    rank: int
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., in]` to `[..., features]`."""
        init, size = nn.initializers.lecun_normal(), (x.shape[-1], self.features)
        kernel = self.param("kernel", init, size)
        bias = self.param("bias", nn.initializers.zeros, size[1:])
        a: jax.Array = self.get_variable("lora", "a")  # [in, rank]
        b: jax.Array = self.get_variable("lora", "b")  # [rank, out]
        return x @ kernel + bias + self.scale * ((x @ a) @ b)


def adapted(
    shape: gpt2.Shape, method: str = "lora", dtype: Any = jnp.float32, **switches: Any
) -> Case:
    """Returns `lorax.adapt` of the model's loss, with every factor away from zero.

    Args:
      shape: sizes.
      method: "lora", "dora" or "adalora" on the blocks' linears; "full" trains every
        parameter of the model, and "none" the biases of `frozen`.
      dtype: of the frozen parameters, and so of the activations.
      **switches: for `gpt2_shaped.Gpt2`.
    """
    batch, key = gpt2.tokens(shape), jax.random.key(1)
    loss = loss_of(gpt2.Gpt2(shape, **switches))
    params = _weights(shape, switches.get("scan", False))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    pattern = WHOLE.get(method, "all-linear")
    target = lorax.Target(
        pattern,
        rank=shape.rank,
        alpha=shape.alpha,
        adapter="full" if method in WHOLE else method,
    )
    kernels = lorax.discover(loss, params, batch)
    adapters, params = lorax.init(key, params, [target], kernels)
    expected = len(gpt2.LINEARS) * (1 if switches.get("scan") else shape.layers)
    if method not in WHOLE and len(adapters) != expected:
        raise RuntimeError(f"{expected} kernels to adapt, found {sorted(adapters)}")
    for i, (path, adapter) in enumerate(sorted(adapters.items())):
        draw = functools.partial(jax.random.normal, jax.random.fold_in(key, i))
        for field, size in MOVED.items():
            if field in adapter.roles:  # at the start, the update is zero
                moved = size * draw(getattr(adapter, field).shape)
                own: Any = adapters[path]
                adapters[path] = dataclasses.replace(own, **{field: moved})
    return Case(lorax.adapt(loss, on_merge="error"), adapters, params, batch)


def by_hand(case: Case, shape: gpt2.Shape, **switches: Any) -> Case:
    """Returns the same program with `LoraDense`, the factors as a nested dict."""
    dense: Any = functools.partial(LoraDense, rank=shape.rank, scale=shape.scale)
    model = gpt2.Gpt2(shape, dense, **switches)

    def loss(lora: Any, params: Any, batch: jax.Array) -> jax.Array:
        variables = {"params": params, "lora": lora}
        logits: Any = model.apply(variables, batch[:, :-1])
        return gpt2.cross_entropy(logits, batch)

    return case._replace(loss=loss, trained=nested(case.trained))


def materialised(case: Case, shape: gpt2.Shape, **switches: Any) -> Case:
    """Returns the same program with `W + scale * a @ b` formed before it runs."""
    plain = loss_of(gpt2.Gpt2(shape, **switches))

    def loss(lora: Any, params: Any, batch: jax.Array) -> jax.Array:
        flat: Any = traverse_util.flatten_dict(params)
        factors: Any = traverse_util.flatten_dict(lora)
        for *owner, name in factors:
            if name == "a":
                a, b = factors[*owner, "a"], factors[*owner, "b"]
                flat[*owner, "kernel"] += shape.scale * a @ b
        return plain(traverse_util.unflatten_dict(flat), batch)

    return case._replace(loss=loss, trained=nested(case.trained))


def frozen(case: Case, shape: gpt2.Shape) -> Case:
    """Returns the unscanned model's step without its adapter term.

    It differentiates the q, k and v biases of the first layer: the backward pass then
    crosses exactly the activations that an adapter's gradients need, and no kernel
    gradient is formed.
    """
    plain = loss_of(gpt2.Gpt2(shape))

    def loss(biases: Any, params: Any, batch: jax.Array) -> jax.Array:
        first = dict(params["h_0"])
        for name, bias in biases.items():
            first[name] = {**first[name], "bias": bias}
        return plain({**params, "h_0": first}, batch)

    biases = {name: case.params["h_0"][name]["bias"] for name in "qkv"}
    return case._replace(loss=loss, trained=biases)


def nested(adapters: Any) -> dict[str, Any]:
    """Turns `{path: Lora}` into the `lora` collection of `LoraDense`."""
    flat = {}
    for path, adapter in adapters.items():
        owner = tuple(path.split("/")[:-1])
        flat[*owner, "a"], flat[*owner, "b"] = adapter.a, adapter.b
    return traverse_util.unflatten_dict(flat)


def in_float64(case: Case) -> Any:
    """Returns the case's loss and gradients in float64, the reference for others."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)),
            (case.trained, case.params),
        )
        return jax.device_get(jax.jit(case.step())(*wide, case.tokens))


def loss_of(model: nn.Module) -> Loss:
    """Returns the mean loss `(params, batch) -> []` of a model."""

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return gpt2.cross_entropy(logits, batch)

    return loss


@functools.cache
def _weights(shape: gpt2.Shape, scan: bool) -> Any:
    """Returns random parameters, cached because they take long to compile."""
    model = gpt2.Gpt2(shape, scan=scan)
    return jax.jit(model.init)(jax.random.key(0), gpt2.tokens(shape)[:, :-1])["params"]
