"""Per-kernel values laid out as matrix x layer, such as rank maps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

NUMBERED = re.compile(r"(.*?)[_.]?(\d+)")


class LayerMap(NamedTuple):
    """A table with a row per matrix and a column per layer.

    Attributes:
      matrices: the rows' names: paths without the layer and the trailing `kernel`.
      layers: the columns' layer numbers.
      values: `[matrices, layers]` float64, NaN where a layer has no such matrix.
    """

    matrices: tuple[str, ...]
    layers: tuple[int, ...]
    values: np.ndarray


def layer_map(values: Mapping[str, Any]) -> LayerMap:
    """Lays out one number per kernel as matrix x layer.

    For AdaLoRA's rank map, pass `lorax.optim.adalora_effective_ranks(opt_state)`; for
    others, for example, `{path: lorax.analysis.effective_rank(s)}` of singular values.

    Args:
      values: `{path: number}`, or `{path: [layers]}` for stacked kernels. The layer of
        a path is the number in its first component that ends in one (`h_3`,
        `layers/3`); a path without any is in layer 0.

    Returns:
      A `LayerMap`, with matrices in order of appearance and layers ascending.

    Raises:
      ValueError: more than one value per layer, or two values for the same cell.

    Example:
      >>> ranks = {"h_0/attn/q/kernel": 4, "h_1/attn/q/kernel": 2, "h_1/up/kernel": 8}
      >>> found = layer_map(ranks)
      >>> found.matrices, found.layers
      (('h/attn/q', 'h/up'), (0, 1))
      >>> found.values.tolist()
      [[4.0, 2.0], [nan, 8.0]]
    """
    cells: dict[tuple[str, int], float] = {}
    for path, value in values.items():
        array = np.asarray(value, np.float64)
        if array.ndim > 1:
            raise ValueError(
                f"{path}: values of shape {array.shape}; a map has one value per "
                "layer, so reduce the other axes (experts) or map each separately"
            )
        layer, name = _place(path)
        for i, number in enumerate(np.atleast_1d(array)):
            cell = name, i if array.ndim else layer
            if cell in cells:
                raise ValueError(
                    f"{path}: there is already a value for {name!r} in layer {cell[1]}"
                )
            cells[cell] = float(number)
    matrices = tuple(dict.fromkeys(name for name, _ in cells))
    layers = tuple(sorted({layer for _, layer in cells}))
    rows = [[cells.get((name, i), np.nan) for i in layers] for name in matrices]
    return LayerMap(matrices, layers, np.array(rows))


def _place(path: str) -> tuple[int, str]:
    """The layer, and the name without it."""
    parts = path.split("/")
    if len(parts) > 1 and parts[-1] in ("kernel", "embedding"):
        parts.pop()
    for i, part in enumerate(parts):
        if found := NUMBERED.fullmatch(part):
            name, number = found.groups()
            parts[i : i + 1] = [name] if name else []
            return int(number), "/".join(parts) or path
    return 0, "/".join(parts)
