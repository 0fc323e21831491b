"""What adapters cost and save, counted from shapes: parameters, bytes, operations.

Everything works on abstract trees (`jax.eval_shape`), so a model of any size can be
counted on a laptop. If a kernel takes F operations per forward pass, a train step takes

    trained whole   3 F         forward, gradient of the input, gradient of the kernel
    frozen          2 F         no gradient of the kernel
    low-rank        2 F + 3 f   f = F rank (in + out) / (in out), the thin products
    maps            2 F + m     m for maps of whole inputs and structured branches
    merged          3 F + m     m for the kernel-sized update

where m counts the products of the parametrisation itself and of its gradient: a map of
the inputs (OFT, HRA), a structured branch (LoKr), and turning its arrays into factors
or norms (LoRA-XS, DoRA). Of the elementwise operations only gains count, with `GAIN`
operations per output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import tree
from lorax.adapters import bound
from lorax.analysis._operations import operations
from lorax.kernels import Kernel
from lorax.types import Adapters, PyTree

GAIN = 14
"""Operations of a gain per output: one to apply it, one for the gradient passing
through it, and twelve to recover its own gradient from the result."""


class Cost(NamedTuple):
    """The cost of one way to train.

    Attributes:
      trained: number of trained parameters.
      checkpoint: bytes of a checkpoint of the trained parameters.
      params: bytes of the base, the adapters and their frozen arrays.
      gradients: bytes of the gradients of the trained parameters.
      moments: bytes of the optimiser state.
      flops: operations of all kernels in a train step; None without `kernels`.
    """

    trained: int
    checkpoint: int
    params: int
    gradients: int
    moments: int
    flops: int | None

    @property
    def memory(self) -> int:
        """Bytes of parameters, gradients and moments, without activations."""
        return self.params + self.gradients + self.moments


class Costs(NamedTuple):
    """The costs of adapters and of full fine-tuning.

    Attributes:
      adapters: the cost of training the adapters.
      full: the cost of training every floating leaf.
    """

    adapters: Cost
    full: Cost

    def ratio(self, field: str) -> float:
        """Returns full fine-tuning's value of a `Cost` field over the adapters'."""
        return getattr(self.full, field) / getattr(self.adapters, field)


def cost(
    adapters: Adapters,
    params: PyTree,
    kernels: Mapping[str, Kernel] | None = None,
    moments: int = 2,
) -> Costs:
    """Counts what training these adapters takes, and what full fine-tuning would.

    Args:
      adapters: `{path: Adapter}`, arrays or abstract.
      params: the base, arrays or abstract.
      kernels: from `lorax.discover`, to count the operations for the batch that it was
        given. Attention and other parts without a kernel are not counted.
      moments: how many arrays of the trained leaves' size and dtype the optimiser
        keeps: 2 for Adam, 1 for momentum, 0 for SGD.

    Returns:
      `Costs`. Leaves are counted in their own dtypes.

    Raises:
      KeyError: an adapter for a path that params lacks.

    Example:
      >>> import lorax
      >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)}
      >>> make = lambda key, params: lorax.init(key, params, [("w", 8)])[0]
      >>> adapters = jax.eval_shape(make, jax.random.key(0), params)
      >>> found = cost(adapters, params)
      >>> found.adapters.trained, found.ratio("trained")
      (16384, 64.0)
    """
    leaves = tree.flatten(params)
    named = {path: k for path, k in (kernels or {}).items() if k.leaves}
    tree.require(adapters, {**leaves, **named}, "parameter tree")
    floating = [leaf for leaf in leaves.values() if tree.is_floating(leaf)]
    trained = jax.tree.leaves(adapters)
    plain, frozen = tree.split(params)
    base, held = (sum(map(_bytes, jax.tree.leaves(x))) for x in (plain, frozen))
    adapters = {path: bound(a, frozen, path) for path, a in adapters.items()}

    def made(trained: list[Any], params: int, flops: int | None) -> Cost:
        size, count = sum(map(_bytes, trained)), sum(x.size for x in trained)
        return Cost(count, size, params, size, moments * size, flops)

    own = whole = None
    if kernels is not None:
        whole = 3 * sum(kernel.flops for kernel in kernels.values())
        own = sum(_flops(k, adapters.get(path)) for path, k in kernels.items())
    return Costs(
        made(trained, base + held + sum(map(_bytes, trained)), own),
        made(floating, base, whole),
    )


def _bytes(leaf: Any) -> int:
    return leaf.size * jnp.dtype(leaf.dtype).itemsize


def _flops(kernel: Kernel, adapter: Any) -> int:
    """The operations of a train step, see the module docstring."""
    if adapter is None:
        return 2 * kernel.flops
    if adapter.replaces:
        return 3 * kernel.flops
    leaf = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    factors = jax.eval_shape(lambda a, leaf: a.factors(leaf), adapter, leaf)
    if factors is None:
        return 3 * kernel.flops + _with_gradient(_merged, adapter, leaf)
    n, m, stack = (math.prod(size) for size in adapter.axes.sizes(kernel.shape))
    rank = factors.a.shape[-1]
    thin = 3 * round(kernel.flops * rank * (n + m) / (n * m))
    rows = round(kernel.flops / (2 * n * m * stack))
    x = jax.ShapeDtypeStruct((stack, rows, n), jnp.float32)
    gain = 0 if factors.gain is None else GAIN * stack * rows * m
    own = _with_gradient(_beside, adapter, leaf, x)
    return 2 * kernel.flops + thin + gain + own


def _merged(adapter: Any, leaf: jax.Array) -> jax.Array:
    return adapter.merge(leaf)


def _beside(adapter: Any, leaf: jax.Array, x: jax.Array) -> Any:
    """The factors made from the arrays, and the maps applied to an input."""
    form = adapter.factors(leaf)
    made: list[Any] = [form.a, form.b, form.gain]
    depth = len(adapter.axes.batch)
    for held in (form.inputs, form.branch):
        if held is not None:
            own = jax.tree.map(lambda f: f.reshape(len(x), *f.shape[depth:]), held)
            made.append(jax.vmap(lambda held, x: held.apply(held.arrays, x))(own, x))
    return made


def _with_gradient(function: Any, adapter: Any, leaf: Any, *rest: Any) -> int:
    """The operations of a function and its gradient in trained arrays and input."""

    def both(adapter: Any, leaf: jax.Array, *rest: jax.Array) -> Any:
        trained = {name: getattr(adapter, name) for name in adapter.roles}

        def own(trained: dict[str, jax.Array], *rest: jax.Array) -> Any:
            return function(adapter.replace(**trained), leaf, *rest)

        out, back = jax.vjp(own, trained, *rest)
        return out, back(jax.tree.map(jnp.ones_like, out))

    return operations(jax.make_jaxpr(both)(adapter, leaf, *rest))
