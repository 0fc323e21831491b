"""Observes what a kernel reads, as the cotangent of a thin argument.

Let X, `[tokens, in]`, be everything that a program multiplies with an adapted kernel,
one row for each application. After every linear use `y = x @ W` goes the identity

    y = seen(y, q, x),     whose backward pass gives q the cotangent  x^T (x q)

so the gradient of q is `X^T X q`, summed over uses, scan steps, shards and batches,
through `jit`, `remat` and `vmap`, as gradients are. The argument q, `[*batch, *in, k]`,
reaches the use through the same views as LoRA's factor `a`. With a random q this is a
sketch of the second moments; with q = 1 it is all of them.

The cotangents of three more columns are the sums over tokens of x, of x^2 and of 1.
Rows count either always or only where the loss depends on their result, that is, where
the cotangent of y is not exactly zero. This leaves out padding that nothing attends to
and tokens that are not routed to an expert, without naming them.

In a `shard_map` with `check_vma=False` every copy of a row counts, because the types do
not say which devices hold the same data: means are right, the number of tokens is not.
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
"""Columns beside q: sum of x, sum of x^2 (this column holds 1), number of rows."""

UNREAD = (
    "conv_general_dilated ragged_dot_general custom_jvp_call custom_vjp_call"
).split()
"""Operations that read an activation although the kernel has to be merged for them."""


class Sums(NamedTuple):
    """Sums over the tokens of one kernel, with its in axes flattened.

    Attributes:
      product: `[*batch, in, k]`, X^T X q.
      total: `[*batch, in]`, sum of x.
      squares: `[*batch, in]`, sum of x^2.
      tokens: `[*batch]`, number of tokens.
    """

    product: jax.Array
    total: jax.Array
    squares: jax.Array
    tokens: jax.Array


def probe(kernel: Kernel, target: Target, q: jax.Array) -> jax.Array:
    """Returns the argument whose gradient holds the sums, from q `[*batch, in, k]`."""
    in_, _, batch = making.sizes(kernel, target)
    columns = jnp.zeros((*q.shape[:-1], EXTRA), q.dtype).at[..., 1].set(1)
    q = jnp.concatenate([q, columns], axis=-1)
    return q.reshape(*batch, *in_, q.shape[-1])


def sums(kernel: Kernel, target: Target, gradient: jax.Array) -> Sums:
    """Reads the gradient of a `probe`."""
    in_, _, batch = making.sizes(kernel, target)
    found = gradient.reshape(*batch, math.prod(in_), gradient.shape[-1])
    total, squares, tokens = (found[..., i - EXTRA] for i in range(EXTRA))
    # all inputs count the same tokens, but one that is scaled by zero counts none
    return Sums(found[..., :-EXTRA], total, squares, jnp.max(tokens, -1))


def observed(
    fn: Callable[..., Any], chosen: dict[str, tuple[Target, Kernel]], every: bool
) -> Callable[..., Any]:
    """Turns `fn(params, batch)` into `fn(probes, params, batch)` with the same value.

    Args:
      fn: a pure function of a parameter tree and a batch.
      chosen: `{path: (target, kernel)}` of the kernels to watch.
      every: also count rows on which the loss does not depend.
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
    """The visitor that puts `seen` after every linear use."""

    derives = False  # a count is none

    def __init__(self, every: bool) -> None:
        self.every = every

    def linear(self, walker: interpret.Walker, use: interpret.Use) -> list[jax.Array]:
        (y,) = walker.frozen(use.eqn, use.operands)
        return [self.beside(walker, use, y)]

    def branches(self, walker: interpret.Walker, use: interpret.Use) -> jax.Array:
        # the program's own derivative rule gives the result: add zeros to it
        (y,) = walker.frozen(use.eqn, use.operands)
        return self.beside(walker, use, jnp.zeros_like(y, use.out.dtype))

    def beside(
        self, walker: interpret.Walker, use: interpret.Use, y: jax.Array
    ) -> jax.Array:
        """Returns y, passed through `seen` for every kernel that the use reads."""
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
        "statistics of its activations; give its target another init"
    )


def _reads(walker: interpret.Walker, use: interpret.Use, term: interpret.Term) -> bool:
    """True for a use that reads the kernel's inputs, False for a transposed one."""
    eqn = use.eqn
    found, made = use.axes(term), term.axes
    tied = None if found is None or made is None else interpret.fits(found, made)
    if made is None or tied is None or not use.low_rank:
        why = "reads the kernel along other axes than its first use"
        raise ValueError(_unseen(walker, eqn, term.path, why))
    if tied:
        return False
    if use.op == "gather":
        why = "looks rows up by index and reads no activation"
        raise ValueError(_unseen(walker, eqn, term.path, why))
    read = [d for d in term.dims("in") if d in use.dims.read]
    size: int = math.prod(term.shape[d] for d in read)
    if size < math.prod(term.leaf[axis] for axis in made.in_):
        why = "reads only a part of the kernel's inputs (a slice, a shard, one by one)"
        raise ValueError(_unseen(walker, eqn, term.path, why))
    return True


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _seen(how: Any, y: jax.Array, q: jax.Array, *operands: jax.Array) -> jax.Array:
    """Returns y; see the module docstring."""
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

    # a kernel scaled along its inputs reads x times the scale, which is `unit` here;
    # the way back to q multiplies by it once more
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
