"""Leaves that are quantised as their tensors are read: one layer is dense at a time.

A format looks at whole kernels: the largest input of an output, the mean of all scales.
A process therefore reads the tensors of such a leaf whole, one after another, and keeps
of the codes what its shards need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import kernels, quantization, sharding
from lorax.interop import leaves
from lorax.quantization import Rules
from lorax.quantized import Format, Quantized
from lorax.types import PyTree


class Plan(NamedTuple):
    """How one leaf is quantised.

    Attributes:
      kernel: the leaf, whose value is abstract.
      form: its format.
    """

    kernel: kernels.Kernel
    form: Format

    @property
    def abstract(self) -> Quantized:
        """The leaf, with shapes in place of arrays."""
        like = jax.ShapeDtypeStruct(self.kernel.shape, self.kernel.dtype)
        return jax.eval_shape(self.of, like)

    def of(self, value: jax.Array, axes: Any = None) -> Quantized:
        """Returns the codes of a value, the leaf's or with other axes a layer's."""
        axes = self.kernel.axes if axes is None else axes
        kernel = dataclasses.replace(self.kernel, value=value, axes=axes)
        return quantization.packed(kernel, self.form)


def plans(
    forward: Callable[..., Any], shapes: PyTree, rules: Rules | None, *args: Any
) -> dict[str, Plan]:
    """Returns by path what rules quantise of a model.

    Args:
      forward: the model, `forward(params, *args)`.
      shapes: its abstract parameters.
      rules: as for `lorax.quantize`; None: nothing.
      *args: the smallest input.
    """
    if rules is None:
        return {}
    found = kernels.discover(forward, shapes, *args)
    chosen = quantization.resolved(shapes, rules, found)
    return {path: Plan(*both) for path, both in chosen.items()}


def read(parts: Sequence[leaves.Part], plan: Plan, where: Any) -> Quantized:
    """Returns a leaf whose layers are quantised one after another.

    Args:
      parts: the tensors and their entries, in the order of the layers.
      plan: of the leaf.
      where: as for `assembled`.
    """
    shape, axes = plan.kernel.shape, plan.kernel.linear_axes()
    stacked = len(shape) > len(parts[0][1].axes)
    dtype = np.result_type(*(tensor.dtype for tensor, _ in parts))
    abstract = dataclasses.replace(plan.abstract, dtype=jnp.dtype(dtype))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def layers() -> Iterator[Quantized]:
        for part in parts:
            dense = leaves.read([part], shape[stacked:], here).astype(dtype)
            yield plan.of(dense, abstract.inner_axes if stacked else axes)

    return assembled(abstract, layers(), stacked, where)


def assembled(
    abstract: Quantized, layers: Iterable[Quantized], stacked: bool, where: Any
) -> Quantized:
    """Returns a leaf from its layers, which are made one after another.

    Args:
      abstract: the leaf, with shapes in place of arrays.
      layers: the codes of each, or of the only one.
      stacked: the first axis of every array numbers the layers.
      where: the sharding of the kernel, or one for each array as
        `sharding.Placed.tree` gives them.
    """
    whole = jax.tree.map(lambda like: np.empty(like.shape, like.dtype), abstract)
    for i, layer in enumerate(layers):
        own = jax.tree.leaves(layer)
        for array, part in zip(jax.tree.leaves(whole), own, strict=True):
            array[i if stacked else ...] = np.asarray(part)
    if isinstance(where, jax.sharding.Sharding):
        where = sharding.of_arrays(abstract, where)

    def placed(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, where, array.__getitem__)

    return jax.tree.map(placed, whole, where)
