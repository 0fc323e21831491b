"""A gather of whole slices along one axis, of a kernel and of its factors."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.extend import core

from lorax.interpret.uses.equations import aval


class Taken(NamedTuple):
    """A gather of whole slices along one axis.

    Attributes:
      eqn: the equation.
      indices: its second operand.
      axis: of the operand, which the indices number.
      ids: `[*shape, 1]`, the indices along it.
      window: for each dimension of the operand that the result has, its place there.
      rows: the dimensions of the result that number the indices.
    """

    eqn: core.JaxprEqn
    indices: jax.Array
    axis: int
    ids: jax.Array
    window: dict[int, int]
    rows: tuple[int, ...]

    @classmethod
    def read(cls, eqn: core.JaxprEqn, indices: jax.Array) -> Taken | None:
        """Reads a gather, or a dynamic_slice under vmap, as `w[:, ids]`; or None."""
        params = eqn.params
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        shape = aval(eqn.invars[0]).shape
        mapped = tuple(numbers.start_index_map)
        partial = [d for d, size in enumerate(shape) if sizes[d] != size]
        axes = partial or [d for d in mapped if sizes[d] == 1]
        if len(axes) != 1 or sizes[axes[0]] != 1 or axes[0] not in mapped:
            return None
        collapsed = set(numbers.collapsed_slice_dims)
        if numbers.operand_batching_dims or not collapsed <= {*axes}:
            return None
        fills = params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
        if len(mapped) > 1 and fills:  # an index beyond 0 on another axis would fill
            return None
        at = mapped.index(axes[0])
        kept = [d for d in range(len(shape)) if d not in collapsed]
        window = dict(zip(kept, numbers.offset_dims, strict=True))
        out = range(len(aval(eqn.outvars[0]).shape))
        rows = tuple(d for d in out if d not in numbers.offset_dims)
        ids = indices[..., at : at + 1]
        return cls(eqn, indices, axes[0], ids, window, rows)

    def of(self, factor: jax.Array, axis: int) -> jax.Array:
        """Returns `[*rows, *other axes]` of a factor that has the axis at `axis`."""
        rows, params = self.ids.ndim - 1, self.eqn.params
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=tuple(range(rows, rows + factor.ndim - 1)),
            collapsed_slice_dims=(axis,),
            start_index_map=(axis,),
        )
        sizes = [1 if d == axis else size for d, size in enumerate(factor.shape)]
        return jax.lax.gather(
            factor,
            self.ids,
            numbers,
            slice_sizes=sizes,
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"],
            mode=params["mode"],
            fill_value=0,
        )
