"""Maps tensors of a Hugging Face checkpoint to leaves of a Flax tree, and back.

A family of models describes its parameters once, as a table of `Entry`: the name on
disk, the path here, whether the matrix is transposed, and the logical axes that
sharding rules refer to. `locate` expands the table for a number of layers.

A torch `nn.Linear` keeps `[out, in]`, Flax `[*in, *out]`: the tensor is transposed and
reshaped to the leaf. GPT-2's `Conv1D` keeps `[in, out]` and is only reshaped. The
`[out, in, height, width]` of a convolution are the leaf's axes in another order.

Several tensors may make up one leaf, each a part of it: the layers of a stack, and what
`Entry.part` indexes, such as the experts of a layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Entry(NamedTuple):
    """One parameter of every layer, or one of the whole model.

    Attributes:
      key: name of the tensor on disk; `{}` stands for the number of the layer.
      path: path of the leaf; `{}` follows the name of the stack, `layers{}/attn/...`.
      axes: logical axis of every dimension of one layer's leaf; None: never sharded.
      transposed: the tensor on disk is `[out, in]`.
      inputs: number of leading axes that are inputs; 0: a vector on disk.
      order: the leaf's axes in their order on disk, those in a tuple merged; None: on
        disk there are two, inputs and outputs, or only one.
      part: index of the tensor in a layer's leaf: numbers, and None for an axis that it
        has whole. `transposed`, `inputs` and `order` refer to the axes that it has.
      numbers: of the stack's layers on disk; None: from 0 on.
    """

    key: str
    path: str
    axes: tuple[str | None, ...]
    transposed: bool = False
    inputs: int = 1
    order: tuple[int | tuple[int, ...], ...] | None = None
    part: tuple[int | None, ...] = ()
    numbers: range | None = None


class Location(NamedTuple):
    """Where one tensor on disk goes.

    Attributes:
      path: of the leaf.
      layer: index on axis 0 of a leaf that stacks its layers; None: the leaf does not.
      entry: the entry that it comes from.
    """

    path: str
    layer: int | None
    entry: Entry

    @property
    def part(self) -> tuple[int | slice, ...]:
        """Which part of the leaf the tensor is: `leaf[part]`."""
        own = tuple(slice(None) if n is None else n for n in self.entry.part)
        return own if self.layer is None else (self.layer, *own)

    def own(self, leaf: Sequence[T]) -> tuple[T, ...]:
        """Returns the items of the tensor's axes, from one for every axis of the leaf.

        Example:
          >>> axes = "experts", "embed", None, "mlp"
          >>> gate = Entry("experts.3.gate", "gate_up", axes, part=(3, None, 0))
          >>> Location("gate_up", None, gate).own((8, 64, 2, 256))
          (64, 256)
        """
        fixed = {axis for axis, at in enumerate(self.part) if isinstance(at, int)}
        return tuple(item for axis, item in enumerate(leaf) if axis not in fixed)


def locate(
    table: Sequence[Entry], stacks: Mapping[str, int], scan: bool
) -> dict[str, Location]:
    """Returns `{key on disk: Location}` for all layers.

    Args:
      table: of the family.
      stacks: `{name: layers}`, by the part of a path before `{}`.
      scan: the layers are stacked, `layers/attn/...`; else `layers_0/attn/...`.
    """
    found = {}
    for entry in table:
        if "{}" not in entry.path:
            found[entry.key] = Location(entry.path, None, entry)
            continue
        for layer in range(stacks[entry.path.partition("{}")[0]]):
            path = entry.path.format("" if scan else f"_{layer}")
            number = layer if entry.numbers is None else entry.numbers[layer]
            where = layer if scan else None
            found[entry.key.format(number)] = Location(path, where, entry)
    return found


def nearest(
    tables: Iterable[Sequence[Entry]],
    stacks: Mapping[str, int],
    scan: bool,
    keys: Collection[str],
) -> dict[str, Location]:
    """Returns `locate` of the table with the fewest keys missing on disk."""
    found = (locate(table, stacks, scan) for table in tables)
    return min(found, key=lambda where: len(where.keys() - keys))


def logical_axes(
    table: Sequence[Entry], stacks: Mapping[str, int], scan: bool
) -> dict[str, tuple[str | None, ...]]:
    """Returns `{path: logical axes}`; a stack's leading axis is called "layers"."""
    found = {}
    for entry in table:
        if "{}" not in entry.path:
            found[entry.path] = entry.axes
        elif scan:
            found[entry.path.format("")] = ("layers", *entry.axes)
        else:
            for layer in range(stacks[entry.path.partition("{}")[0]]):
                found[entry.path.format(f"_{layer}")] = entry.axes
    return found


def _groups(entry: Entry, ndim: int) -> list[tuple[int, ...]]:
    """The axes of a part that make up each axis on disk."""
    if entry.order is not None:
        return [own if isinstance(own, tuple) else (own,) for own in entry.order]
    axes = tuple(range(ndim))
    if not entry.inputs:
        return [axes]
    two = [axes[: entry.inputs], axes[entry.inputs :]]
    return two[::-1] if entry.transposed else two


def from_disk(tensor: np.ndarray, shape: Sequence[int], entry: Entry) -> np.ndarray:
    """Returns the tensor as a part of `shape` of a layer's leaf, if possible a view.

    Raises:
      ValueError: the numbers of elements differ.
    """
    if tensor.size != math.prod(shape):
        raise ValueError(f"shape {list(tensor.shape)} cannot be {list(shape)}")
    axes = [axis for own in _groups(entry, len(shape)) for axis in own]
    return tensor.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))


def to_disk(part: np.ndarray, entry: Entry) -> np.ndarray:
    """Returns a part of a layer's leaf as the tensor on disk."""
    axes = [axis for own in _groups(entry, part.ndim) for axis in own]
    return part.transpose(axes).reshape(disk_shape(part.shape, entry))


def disk_shape(shape: Sequence[int], entry: Entry) -> tuple[int, ...]:
    """Returns the shape on disk of a part of `shape`."""
    groups = _groups(entry, len(shape))
    return tuple(math.prod(shape[axis] for axis in own) for own in groups)


def rows_of(entry: Entry, ndim: int) -> int | None:
    """Returns which axis of a part is the first on disk; None if it is several."""
    first = _groups(entry, ndim)[0]
    return first[0] if len(first) == 1 else None


def linear(
    key: str,
    path: str,
    inputs: Sequence[str | None],
    outputs: Sequence[str | None],
    *,
    bias: bool = False,
    transposed: bool = True,
) -> tuple[Entry, ...]:
    """Returns the entries of a linear map: its kernel, and its bias if it has one.

    Args:
      key: of the module on disk, without `.weight`.
      path: of the module here, without `/kernel`.
      inputs: logical axes of the inputs.
      outputs: likewise of the outputs.
      bias: whether it has a bias.
      transposed: `nn.Linear`; False: `Conv1D`.
    """
    axes = *inputs, *outputs
    kernel = Entry(f"{key}.weight", f"{path}/kernel", axes, transposed, len(inputs))
    if not bias:
        return (kernel,)
    return kernel, Entry(f"{key}.bias", f"{path}/bias", tuple(outputs), inputs=0)


def renamed(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Applies each `(regex of a prefix, replacement)` to a name on disk."""
    for pattern, new in pairs:
        key = re.sub(f"^{pattern}", new, key, count=1)
    return key


def convolution(key: str, path: str) -> tuple[Entry, ...]:
    """Returns the entries of a convolution of images: kernel and bias.

    The kernel is `[height, width, in, out]`, on disk `[out, in, height, width]`.
    """
    axes = None, None, None, "embed"
    order = 3, 2, 0, 1
    return (
        Entry(f"{key}.weight", f"{path}/kernel", axes, order=order, inputs=3),
        Entry(f"{key}.bias", f"{path}/bias", axes[3:], inputs=0),
    )


def layer_norm(key: str, path: str) -> tuple[Entry, ...]:
    """Returns the entries of a layer norm: scale and bias."""
    return (
        Entry(f"{key}.weight", f"{path}/scale", (None,), inputs=0),
        Entry(f"{key}.bias", f"{path}/bias", (None,), inputs=0),
    )


def rms_norm(key: str, path: str) -> tuple[Entry, ...]:
    """Returns the entry of an RMS norm: its scale."""
    return (Entry(f"{key}.weight", f"{path}/scale", (None,), inputs=0),)


def embedding(key: str, path: str, rows: str | None = "vocab") -> Entry:
    """Returns the entry of an embedding `[rows, width]`."""
    return Entry(f"{key}.weight", f"{path}/embedding", (rows, "embed"))


def bare(table: Sequence[Entry], root: str) -> tuple[Entry, ...]:
    """Returns the table of a model by itself, without `root` in front of its keys."""
    return tuple(e._replace(key=e.key.removeprefix(f"{root}.")) for e in table)


def inside(key: str, path: str, block: Sequence[Entry]) -> list[Entry]:
    """Returns the entries of a module's parts, prefixed with the module's name."""
    return [e._replace(key=f"{key}.{e.key}", path=f"{path}/{e.path}") for e in block]
