"""One kernel used in one product, so its gradient is known: numpy in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lorax
from lorax.types import Base
from tests import programs


class Case(NamedTuple):
    """What an adapter does to one kernel, and what a reference needs.

    Attributes:
      adapter: the adapter, perturbed.
      params: as returned by `lorax.init`.
      fields: the adapter's arrays and frozen ones, by field, in float64.
      kernel: `[in, out]`, in float64.
      delta: what merging adds to the kernel.
      cotangent: G = dL/dW of the loss.
      gradients: by field, from `jax.grad` of the adapted loss.
    """

    adapter: Any
    params: Any
    fields: dict[str, np.ndarray]
    kernel: np.ndarray
    delta: np.ndarray
    cotangent: np.ndarray
    gradients: dict[str, np.ndarray]


def wide(x):
    return np.asarray(x, np.float64)


def case(target, shape=(7, 6), size=0.4, on_merge="error"):
    """Builds a case: the loss is sum(C * (x W)), so G = x^T C for any adapter."""
    params = {"w": programs.normal(1, *shape)}
    x, c = programs.normal(2, 5, shape[0]), programs.normal(3, 5, shape[1])
    adapters, params = lorax.init(jax.random.key(0), params, target)
    adapters = programs.perturbed(adapters, size)
    loss = lorax.adapt(lambda p, x: jnp.sum(c * (x @ p["w"])), on_merge=on_merge)
    grads = jax.jit(jax.grad(loss))(adapters, params, x)["w"]
    adapter = adapters["w"]
    plain, frozen = params if isinstance(params, Base) else (params, {})
    fields = {name: wide(getattr(adapter, name)) for name in adapter.roles}
    fields |= {field: wide(frozen[name]) for field, name in adapter.lent}
    kernel = wide(plain["w"])
    return Case(
        adapter,
        params,
        fields,
        kernel,
        wide(lorax.merge(adapters, params)["w"]) - kernel,
        wide(x).T @ wide(c),
        {name: wide(getattr(grads, name)) for name in adapter.roles},
    )


def assert_close(found, expected, rtol=2e-5):
    """Compares, relative to the largest entry."""
    expected = np.asarray(expected)
    off = np.abs(found - expected).max()
    assert off <= rtol * np.abs(expected).max(), off
    assert np.abs(expected).max() > 1e-3


def assert_gradients(case, expected):
    """Compares every field's gradient with the reference's."""
    assert set(case.gradients) == set(expected)
    for name, gradient in expected.items():
        assert_close(case.gradients[name], gradient)
