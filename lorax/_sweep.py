"""A sum over chunks whose gradient is computed in the same sweep.

    total(shared, chunks) = sum_i f(shared, chunks_i)

The backward pass of a sum starts from one scalar, the same for every chunk. So the
loop can compute each chunk's gradient for a cotangent of one while the chunk's
intermediates are at hand; the backward pass only scales it. No intermediate outlives
its loop step.

The interpreter recognises the loop by the name of its step, enters it, and rebuilds it
around the step that it emits (`interpret.rules.sweeps`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NAME = "lorax_step_of_sweep"
"""The jitted step's name in programs and profiles."""


class _How(NamedTuple):
    """What is known about a sweep before it runs.

    Attributes:
      step: jitted function of the leaves of `shared` and of one chunk.
      shared: how many leaves every chunk reads.
      dtypes: the dtypes of all leaves.
    """

    step: Callable[..., tuple[jax.Array, ...]]
    shared: int
    dtypes: tuple[Any, ...]


def swept(
    function: Callable[[Any, Any], Sequence[jax.Array]], shared: Any, chunks: Any
) -> tuple[jax.Array, ...]:
    """Sums the results of a function over chunks.

    Args:
      function: `(shared, chunk) -> scalars`; must not close over a traced array.
        Gradients are those of the first scalar; the others count as constants.
      shared: a tree of arrays that every chunk reads.
      chunks: a tree of arrays `[chunks, ...]`.

    Returns:
      The sums of the scalars.
    """
    leaves, structure = jax.tree.flatten((shared, chunks))

    def step(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(function(*jax.tree.unflatten(structure, leaves)))

    step.__name__ = NAME
    known = len(jax.tree.leaves(shared)), tuple(leaf.dtype for leaf in leaves)
    return _sums(_How(jax.jit(step), *known), *leaves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(how: _How, *leaves: jax.Array) -> tuple[jax.Array, ...]:
    shared, chunks = leaves[: how.shared], leaves[how.shared :]

    def body(sums: Any, chunk: Any) -> Any:
        return _plus(sums, how.step(*shared, *chunk)), None

    return jax.lax.scan(body, _zeros(how, leaves), chunks)[0]


def _forward(how: _How, *leaves: Any) -> tuple[Any, dict[int, jax.Array]]:
    """The sums, and the gradients of the differentiated leaves by index."""
    values, n = [leaf.value for leaf in leaves], how.shared
    moving = [i for i, leaf in enumerate(leaves) if leaf.perturbed]

    def body(carry: Any, chunk: Any) -> Any:
        given = dict(enumerate([*values[:n], *chunk]))

        def total(own: dict[int, jax.Array]) -> Any:
            first, *others = how.step(*(given | own).values())
            return first, others

        (first, others), found = jax.value_and_grad(total, has_aux=True)(
            {i: given[i] for i in moving}
        )
        of_shared = {i: g + found.pop(i) for i, g in carry[1].items()}
        return (_plus(carry[0], (first, *others)), of_shared), found

    none = {i: _wide_zeros(values[i]) for i in moving if i < n}
    begin = _zeros(how, values), none
    (sums, of_shared), of_chunks = jax.lax.scan(body, begin, tuple(values[n:]))
    return sums, of_shared | of_chunks


def _backward(how: _How, grads: dict[int, jax.Array], cotangents: Any) -> Any:
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        grads = {}
    made = {i: (g * scale).astype(how.dtypes[i]) for i, g in grads.items()}
    return tuple(made.get(i) for i in range(len(how.dtypes)))


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _plus(sums: Any, more: Any) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.add, sums, more))


def _zeros(how: _How, leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    def first(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        chunk = (leaf[0] for leaf in leaves[how.shared :])
        return how.step(*leaves[: how.shared], *chunk)

    kinds = jax.eval_shape(first, *leaves)
    return tuple(jnp.zeros(kind.shape, kind.dtype) for kind in kinds)


def _wide_zeros(leaf: jax.Array) -> jax.Array:
    """Zeros to accumulate gradients in: at least float32."""
    return jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
