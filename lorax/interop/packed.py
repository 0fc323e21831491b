"""Leaves that are quantised while loading, with only one layer dense at a time.

A format needs whole kernels: the largest input of an output, the mean of all scales. A
process therefore reads all tensors of such a leaf in full, one at a time, and then
keeps the codes that its shards need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from lorax import quantization, sharding
from lorax.interop import leaves
from lorax.kernels import Kernel, discover
from lorax.quantized import Format, Quantized
from lorax.types import Axes, PyTree


class Plan(NamedTuple):
    """How to quantise one leaf while reading it.

    Attributes:
      parts: the tensors and where they go; together they form the leaf.
      kernel: the leaf, with an abstract value.
      form: its format.
    """

    parts: Sequence[leaves.Part]
    kernel: Kernel
    form: Format

    @property
    def abstract(self) -> Quantized:
        """The leaf, with shapes in place of arrays."""
        like = jax.ShapeDtypeStruct(self.kernel.shape, self._dtype)
        axes = self.kernel.linear_axes()
        return jax.eval_shape(lambda value: self._packed(value, axes), like)

    def read(self, where: Any) -> Quantized:
        """Returns the leaf; see `assembled`."""
        leaf = self.abstract
        stacked = self.parts[0][1].layer is not None
        axes = leaf.inner_axes if stacked else leaf.axes
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def layers() -> Iterator[Quantized]:
            for parts in leaves.by_layer(self.parts):
                dense = leaves.read(parts, leaf.shape[stacked:], here)
                yield self._packed(dense.astype(self._dtype), axes)

        return assembled(leaf, layers(), stacked, where)

    @property
    def _dtype(self) -> np.dtype:
        return np.result_type(*(tensor.dtype for tensor, _ in self.parts))

    def _packed(self, value: jax.Array, axes: Axes) -> Quantized:
        kernel = dataclasses.replace(self.kernel, value=value, axes=axes)
        return quantization.packed(kernel, self.form)


def chosen(
    model: nn.Module, shapes: PyTree, rules: quantization.Rules, inputs: Sequence[Any]
) -> dict[str, tuple[Kernel, Format]]:
    """Returns the kernels of a model that rules quantise, and their formats, by path.

    Args:
      model: a Flax module.
      shapes: its abstract parameters.
      rules: as for `lorax.quantize`.
      inputs: the smallest possible inputs.
    """

    def run(params: PyTree, *inputs: Any) -> Any:
        return model.apply({"params": params}, *inputs)

    return quantization.resolved(shapes, rules, discover(run, shapes, *inputs))


def plans(
    chosen: Mapping[str, tuple[Kernel, Format]],
    found: Mapping[str, Sequence[leaves.Part]],
    coded: Collection[str] = (),
) -> dict[str, Plan]:
    """Returns plans for the leaves that rules quantise, by path.

    Args:
      chosen: what the function of that name returns.
      found: the tensors of every leaf.
      coded: paths whose tensors are already quantised.

    Raises:
      ValueError: a chosen leaf is already quantised, or has no tensors.
    """
    for path in chosen:
        if path in coded:
            raise ValueError(
                f"{path}: the checkpoint's leaf is already quantised; leave quantize= "
                f"out, or begin it with a rule ({path!r}, None)"
            )
        if path not in found:
            raise ValueError(
                f"{path}: the checkpoint lacks this leaf, so it is newly initialised "
                f"and must be trained; begin quantize= with a rule ({path!r}, None)"
            )
    return {path: Plan(found[path], *both) for path, both in chosen.items()}


def assembled(
    abstract: Quantized, layers: Iterable[Quantized], stacked: bool, where: Any
) -> Quantized:
    """Assembles a leaf from its layers, which are computed one at a time.

    Args:
      abstract: the leaf, with shapes in place of arrays.
      layers: the codes of each layer, or of the only one.
      stacked: whether the first axis of every array indexes the layers.
      where: the sharding of the kernel, or one for each array as in
        `sharding.Placed.tree`.
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
