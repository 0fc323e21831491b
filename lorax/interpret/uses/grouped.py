"""Products with factors whose axes have another role in the use than in the adapter.

A pair per expert meets a use that writes the expert axis as an output or sums over it:

    td,edf->tef     h = td,edr->ter    y = ter,erf->tef      experts written
    tef,efd->td     h = tef,efr->ter   y = ter,erd->td       experts summed

An axis of both factors is batched wherever both operands of a product have it, and
summed in the second product where the use sums over it. An axis of one factor that the
use batches (heads written by a kernel, and read head by head elsewhere) is batched in
that factor's product alone. The cost is that of the pairs, `rank` columns per expert.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax import _explicit
from lorax.interpret.uses.thin import Result

Name = int | str | tuple[str, int]
"""A dimension: the view's by number, by name one of the activation, or the rank."""
RANK = "rank"


class Named(NamedTuple):
    """An array whose dimensions have names."""

    array: jax.Array
    names: tuple[Name, ...]


class Places(NamedTuple):
    """Which dimensions of the view the factors of a `Pair` have.

    Attributes:
      first: of `first`, in its order, before the rank.
      both: those of them that `second` has as well, before its rank.
      second: of `second`, after the rank.
    """

    first: tuple[int, ...]
    both: tuple[int, ...]
    second: tuple[int, ...]


def dot(
    x: Named,
    first: jax.Array,
    second: jax.Array,
    places: Places,
    *,
    batch: Sequence[int],
    write: Sequence[int],
    result: Result,
) -> jax.Array:
    """Returns `(x @ first) @ second`, batched and summed as described above.

    Args:
      x: the activation, its dimensions named by those of the view that they meet.
      first: `[*places.first, rank]`.
      second: `[*places.both, rank, *places.second]`.
      places: which dimensions of the view the factors have.
      batch: dimensions of the view that the use batches.
      write: those that it writes, in view order.
      result: how the product is computed.

    Returns:
      `[*batch, *free dimensions of x, *write]`; a dimension that neither factor has is
      of length one.
    """
    if x.array.dtype.itemsize == 1:  # 8 bits: the factors come in bfloat16
        x = Named(x.array.astype(first.dtype), x.names)
    inner = Named(first, (*places.first, RANK))
    outer = Named(second, (*places.both, RANK, *places.second))
    unread = {name for name in x.names if isinstance(name, int)} - {*batch}
    idle = [i for i, n in enumerate(x.names) if n in unread - {*places.first}]
    names = tuple(n for i, n in enumerate(x.names) if i not in idle)
    x = Named(jax.lax.squeeze(x.array, idle), names)  # axes of length one
    free = [name for name in x.names if isinstance(name, tuple)]
    where = dict(zip(x.names, _explicit.entries(x.array), strict=True))
    where |= dict(zip((*batch, *free, *write), result.lies, strict=True))
    product = functools.partial(_product, precision=result.precision, lies=where)
    h = product(x, inner, kept={*batch, *places.both}, dtype=second.dtype)
    h = Named(h.array.astype(second.dtype), h.names)
    y = product(h, outer, kept={*batch, *write}, dtype=result.dtype)
    own = [d for d in write if d in y.names]
    y = Named(
        y.array.transpose([y.names.index(n) for n in [*batch, *free, *own]]),
        (*batch, *free, *own),
    )
    units = [len(batch) + len(free) + i for i, d in enumerate(write) if d not in own]
    return jax.lax.expand_dims(y.array, units)


def _product(
    x: Named,
    w: Named,
    *,
    kept: set[Name],
    precision: jax.lax.PrecisionLike,
    dtype: jnp.dtype,
    lies: Mapping[Name, _explicit.Entry],
) -> Named:
    """Contracts shared names, except those in `kept`, which are batched."""
    shared = [name for name in x.names if name in w.names]
    batch = [name for name in shared if name in kept]
    read = [name for name in shared if name not in kept]
    at = lambda v, names: [v.names.index(name) for name in names]
    numbers = (at(x, read), at(w, read)), (at(x, batch), at(w, batch))
    names = (*batch, *(n for v in (x, w) for n in v.names if n not in shared))
    wanted = [lies.get(name) for name in names]
    y = _explicit.dot(x.array, w.array, numbers, precision, dtype=dtype, wanted=wanted)
    return Named(y, names)
