"""The operations that read an activation, with thin columns in place of the kernel.

    h = thin(q, x)         as y = x @ W, for q [*batch, *in, columns]

Its transpose in q gives `x^T h` in q's own layout, whatever the operation. A `Reader`
also knows which rows of h the cotangent of y touches, and how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lorax import _explicit, interpret, linalg


class Reader(Protocol):
    """One use of one kernel.

    Attributes:
      operands: the activation, and whatever else `thin` needs.
    """

    operands: tuple[jax.Array, ...]

    def thin(self, q: jax.Array, *operands: jax.Array) -> jax.Array:
        """Applies the operation to q in place of the kernel, with the columns last."""

    def rows(self, change: jax.Array) -> jax.Array:
        """Returns which rows a change of y touches, laid out as `thin` of a column."""

    def tokens(self, rows: jax.Array, unit: jax.Array, *operands: Any) -> jax.Array:
        """Returns how many rows count, like `unit`, `[*batch, *in, 1]`."""
        x, *rest = operands  # sums a one over the rows, for every input
        thin = lambda q: self.thin(q, jnp.ones_like(x), *rest)
        return jax.linear_transpose(thin, unit)(rows)[0]


Name = int | tuple[str, int]
"""A dimension: the view's by number; by name one of the activation, or the columns."""


def _input(use: interpret.Use) -> jax.Array:
    """The activation of a use that reads one."""
    assert use.input is not None
    return use.input


class _Dot(Reader):
    """A `dot_general`: named dimensions, contracted as the factor `a` would be."""

    def __init__(self, use: interpret.Use, term: interpret.Term) -> None:
        x, self.use, self.term = _input(use), use, term
        stack, read = term.dims("batch"), term.dims("in")
        x_read = [use.applied[d] for d in use.dims.read]
        x = interpret.window(x, term, x_read, use.dims.read)
        met = {place: d for d, place in use.applied.items()}
        idle = [i for i, d in met.items() if d not in (*stack, *read)]
        self.of_x = [met.get(i, ("x", i)) for i in range(x.ndim) if i not in idle]
        self.of_q = [*stack, *read]
        kept = [n for n in self.of_x if n not in read]
        self.of_h = [*kept, *(d for d in stack if d not in self.of_x)]
        self.operands = (jax.lax.squeeze(x, idle),)  # axes of length one

    def thin(self, q: jax.Array, *operands: jax.Array) -> jax.Array:
        (x,) = operands
        column = ("column", 0)
        return _einsum((x, self.of_x), (q, [*self.of_q, column]), [*self.of_h, column])

    def rows(self, change: jax.Array) -> jax.Array:
        free = iter([n for n in self.of_x if isinstance(n, tuple)])
        at = {place: d for d, place in self.use.written.items()}
        names = [at[i] if i in at else next(free) for i in range(change.ndim)]
        for d, place in self.use.written.items():  # this leaf's part of a fused kernel
            low, size = self.term.start[d], self.term.shape[d]
            if size != change.shape[place]:
                change = jax.lax.slice_in_dim(change, low, low + size, axis=place)
        out = [i for i, name in enumerate(names) if name not in self.of_h]
        change = jnp.any(change != 0, axis=out)
        names = [name for name in names if name in self.of_h]
        change = change.transpose([names.index(n) for n in self.of_h if n in names])
        missing = [i for i, n in enumerate(self.of_h) if n not in names]
        return jnp.expand_dims(change, [*missing, len(self.of_h)])


def _einsum(x: Any, y: Any, names: Sequence[Name]) -> jax.Array:
    """The product of two arrays with named dimensions."""
    (x, of_x), (y, of_y) = x, y
    known = list(dict.fromkeys([*of_x, *of_y]))
    numbers = lambda of: [known.index(name) for name in of]
    lies = dict(zip(of_y, _explicit.entries(y), strict=True))
    lies |= dict(zip(of_x, _explicit.entries(x), strict=True))
    return jnp.einsum(
        x,
        numbers(of_x),
        y,
        numbers(of_y),
        numbers(names),
        precision=linalg.EXACT,
        out_sharding=_explicit.named([lies[name] for name in names], x, y),
    )


class _Ragged(Reader):
    """A `ragged_dot`: each group's rows with its own q."""

    def __init__(self, use: interpret.Use, term: interpret.Term) -> None:
        del term
        assert use.groups is not None
        self.operands = _input(use), use.groups

    def thin(self, q: jax.Array, *operands: jax.Array) -> jax.Array:
        x, groups = operands
        return jax.lax.ragged_dot(x, q, groups, precision=linalg.EXACT)

    def rows(self, change: jax.Array) -> jax.Array:
        return jnp.any(change != 0, axis=-1, keepdims=True)


class _Conv(Reader):
    """A convolution: a row is one position of the window, in each group of channels."""

    def __init__(self, use: interpret.Use, term: interpret.Term) -> None:
        del term
        self.params, (self.to,) = use.eqn.params, use.dims.write
        self.features = use.written[self.to]
        self.groups = self.params["feature_group_count"]
        self.operands = (_input(use),)

    def thin(self, q: jax.Array, *operands: jax.Array) -> jax.Array:
        (x,), columns = operands, q.shape[-1]
        names = "window_strides padding lhs_dilation rhs_dilation dimension_numbers"
        kernel = jnp.moveaxis(q, -1, self.to)
        h = jax.lax.conv_general_dilated(
            x,
            jnp.concatenate([kernel] * self.groups, axis=self.to),
            **{name: self.params[name] for name in names.split()},
            feature_group_count=self.groups,
            precision=linalg.EXACT,
        )
        h = jnp.moveaxis(h, self.features, -1)
        return h.reshape(*h.shape[:-1], self.groups, columns)

    def rows(self, change: jax.Array) -> jax.Array:
        change = jnp.moveaxis(change, self.features, -1) != 0
        change = change.reshape(*change.shape[:-1], self.groups, -1)
        return jnp.any(change, axis=-1, keepdims=True)

    def tokens(self, rows: jax.Array, unit: jax.Array, *operands: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.sum(rows), unit.shape)


READERS: dict[str, Callable[..., Reader]] = {
    "dot": _Dot,
    "ragged_dot": _Ragged,
    "conv": _Conv,
    "grouped_conv": _Conv,
    "depthwise_conv": _Conv,
}
