"""What a kernel reads, as the cotangent of a thin argument.

Let X, [tokens, in], be all that an adapted kernel meets in a program, one row for each
time that it is applied. Beside every linear use `y = x @ W` stands the identity

    y = seen(y, q, x),     whose backward pass gives q the cotangent  x^T (x q)

so that the gradient of q is `X^T X q`: summed over uses, over the steps of a scan, over
shards and batches, through `jit`, `remat` and `vmap`, as gradients are. The argument q,
`[*batch, *in, k]`, travels to the use as the factor `a` of LoRA does, through the same
views. With q random this is a sketch of the second moments, with q = 1 they are whole.

Three columns ride along, whose cotangents are the sums over tokens of x, of x^2, and of
one. A row may count always, or only where the loss depends on its result: where the
cotangent of y is not exactly zero. Padding that nothing attends to, and experts that a
token is not routed to, are then left out without being named.

In a `shard_map` with `check_vma=False` every copy of a row counts, since the types do
not say which devices hold the same: means are right, the number of tokens is not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lorax import _explicit, interpret, tree
from lorax.activations.readers import READERS
from lorax.adapters import Lora, making
from lorax.kernels import Kernel
from lorax.targets import Target
from lorax.types import PyTree

EXTRA = 3
"""Columns beside q: the sum of x; that of x^2, which holds one; the number of rows."""

UNREAD = (
    "conv_general_dilated ragged_dot_general custom_jvp_call custom_vjp_call"
).split()
"""Operations that do read an input where the kernel they meet has to be merged."""


class Sums(NamedTuple):
    """Sums over the tokens of one kernel, its in axes flattened.

    Attributes:
      product: `[*batch, in, k]`, X^T X q.
      total: `[*batch, in]`, of x.
      squares: `[*batch, in]`, of x^2.
      tokens: `[*batch]`, how many.
    """

    product: jax.Array
    total: jax.Array
    squares: jax.Array
    tokens: jax.Array


def probe(kernel: Kernel, target: Target, q: jax.Array) -> jax.Array:
    """Returns the argument whose gradient has the sums, from q `[*batch, in, k]`."""
    in_, _, batch = making.sizes(kernel, target)
    columns = jnp.zeros((*q.shape[:-1], EXTRA), q.dtype).at[..., 1].set(1)
    q = jnp.concatenate([q, columns], axis=-1)
    return q.reshape(*batch, *in_, q.shape[-1])


def sums(kernel: Kernel, target: Target, gradient: jax.Array) -> Sums:
    """Reads the gradient of a `probe`."""
    in_, _, batch = making.sizes(kernel, target)
    found = gradient.reshape(*batch, math.prod(in_), gradient.shape[-1])
    total, squares, tokens = (found[..., i - EXTRA] for i in range(EXTRA))
    # padding of a convolution is not counted as a token of the border's own
    return Sums(found[..., :-EXTRA], total, squares, jnp.max(tokens, -1))


def observed(
    fn: Callable[..., Any], chosen: dict[str, tuple[Target, Kernel]], every: bool
) -> Callable[..., Any]:
    """Makes `fn(params, batch)` one of `(probes, params, batch)`, of the same value.

    Args:
      fn: a pure function of a parameter tree and a batch.
      chosen: `{path: (target, kernel)}` of the kernels to watch.
      every: count rows on which the loss does not depend, too.
    """

    def watched(probes: dict[str, jax.Array], params: PyTree, batch: Any) -> Any:
        leaves = tree.flatten(params)
        thin = {path: jnp.asarray(leaves[path]) for path in sorted(probes)}
        views = []
        for path, leaf in thin.items():
            target, kernel = chosen[path]
            _, out, stack = making.sizes(kernel, target)
            silent = jnp.zeros((*stack, probes[path].shape[-1], *out))
            axes = kernel.linear_axes()
            pair = Lora(probes[path], silent, 1.0, axes, 0.0, target.layers)
            view = interpret.watch(path, leaf)
            views.append(view.adapted(pair.factors(leaf), axes))
        call = lambda thin: fn(tree.replace(params, thin), batch)
        jaxpr, rebuild = interpret.trace(call, thin)
        outs = interpret.Walker(_Observer(every)).run(jaxpr, views)
        return rebuild([interpret.frozen(out) for out in outs])

    return watched


class _Observer:
    """The visitor that puts `seen` behind every linear use."""

    derives = False  # a count is none

    def __init__(self, every: bool) -> None:
        self.every = every

    def linear(self, walker: interpret.Walker, use: interpret.Use) -> list[jax.Array]:
        (y,) = walker.frozen(use.eqn, use.operands)
        return [self.beside(walker, use, y)]

    def branches(self, walker: interpret.Walker, use: interpret.Use) -> jax.Array:
        # a derivative rule of the program's own has the result: add nothing
        (y,) = walker.frozen(use.eqn, use.operands)
        return self.beside(walker, use, jnp.zeros_like(y, use.out.dtype))

    def beside(
        self, walker: interpret.Walker, use: interpret.Use, y: jax.Array
    ) -> jax.Array:
        """Returns y, behind which the use is seen."""
        for term in use.view.terms:
            if _reads(walker, use, term):
                reader = READERS[use.op](use, term)
                assert term.factors is not None
                x, *rest = reader.operands
                y = _seen((reader, self.every), y, term.factors.a, x, *rest)
        return y

    def merge(
        self, walker: interpret.Walker, eqn: JaxprEqn, view: interpret.Tracked
    ) -> jax.Array:
        if eqn.primitive.name in UNREAD:
            why = "hides what the kernel reads"
            raise ValueError(_unseen(walker, eqn, view.paths[0], why))
        return view.array

    def decoded(
        self, walker: interpret.Walker, eqn: JaxprEqn, view: interpret.Tracked
    ) -> jax.Array:
        return view.array

    def custom(
        self, walker: interpret.Walker, eqn: JaxprEqn, paths: tuple[str, ...]
    ) -> bool:
        return True


def _unseen(walker: interpret.Walker, eqn: JaxprEqn, path: str, why: str) -> str:
    return (
        f"{path}: {eqn.primitive.name!r} at {walker.line(eqn)} {why}, so there are no "
        "statistics of its activations; give the leaf a target with another init"
    )


def _reads(walker: interpret.Walker, use: interpret.Use, term: interpret.Term) -> bool:
    """True for a use that reads the kernel's inputs, False for a transposed one."""
    eqn = use.eqn
    found, made = use.axes(term), term.axes
    tied = None if found is None or made is None else interpret.fits(found, made)
    if made is None or tied is None or not use.low_rank:
        why = "reads the kernel by other axes than its first use"
        raise ValueError(_unseen(walker, eqn, term.path, why))
    if tied:
        return False
    if use.op == "gather":
        why = "looks rows up by number, and reads no activation"
        raise ValueError(_unseen(walker, eqn, term.path, why))
    read = [d for d in term.dims("in") if d in use.dims.read]
    size: int = math.prod(term.shape[d] for d in read)
    if size < math.prod(term.leaf[axis] for axis in made.in_):
        why = "reads a part of the kernel's inputs (a slice, a shard, one by one)"
        raise ValueError(_unseen(walker, eqn, term.path, why))
    return True


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _seen(how: Any, y: jax.Array, q: jax.Array, *operands: jax.Array) -> jax.Array:
    """Returns y; see the module."""
    del how, q, operands
    return y


def _forward(how: Any, y: jax.Array, q: jax.Array, *operands: jax.Array) -> Any:
    del how
    return y, (q, operands)


def _backward(how: Any, kept: Any, change: jax.Array) -> Any:
    (reader, every), (probe, (x, *rest)) = how, kept
    q, unit = probe[..., :-EXTRA], probe[..., 1 - EXTRA, None]
    x = x.astype(q.dtype)
    h = reader.thin(q, x, *rest)
    rows = reader.rows(jnp.ones_like(change) if every else change).astype(q.dtype)
    rows = jnp.broadcast_to(_explicit.like(rows, h), (*h.shape[:-1], 1))

    def back(x: jax.Array, h: jax.Array, like: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda q: reader.thin(q, x, *rest), like)(h)[0]

    # a kernel that was scaled along its inputs reads x times that: unit is the scale,
    # and q's own way back multiplies by it once
    count = reader.tokens(rows, unit, x, *rest)
    columns = [
        back(x, h * rows, q),
        back(x, rows, unit),
        unit * back(x * x, rows, unit),
        count / jnp.where(unit == 0, 1, unit),
    ]
    found = jnp.concatenate(columns, axis=-1)
    return (change, found, *(None for _ in (x, *rest)))


_seen.defvjp(_forward, _backward)
