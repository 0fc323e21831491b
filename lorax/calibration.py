"""Statistics for inits that look at data: gradient directions from thin products.

With A = 0 and B = Omega random, the gradient of A is `G Omega^T`, a sketch of the range
of the kernel's gradient G; with A = Q orthonormal and B = 0, that of B is `Q^T G`. So a
randomised SVD of G needs only LoRA backward passes: no `[in, out]` gradient is formed,
and scan, remat and sharding work as they do in training. Statistics of the kernels'
inputs come from gradients, too: see `activations`.

References:
  Halko, Martinsson, Tropp, Finding Structure with Randomness, arXiv:0909.4061.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lorax import activations, inits, linalg, transform, tree
from lorax.adapters import Full, Lora, making
from lorax.kernels import Kernel
from lorax.selection import select
from lorax.targets import Rule, Target
from lorax.types import ActivationStats, Adapters, Covariance, GradSketch, PyTree

Chosen = dict[str, tuple[Target, Kernel]]
Stats = GradSketch | ActivationStats | Covariance
KEPT = 2  # x rank: the directions that LoRA-GA uses


def calibrate(
    key: jax.Array,
    loss_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    targets: Rule | Iterable[Rule],
    batches: Iterable[Any],
    kernels: Mapping[str, Kernel] | None = None,
    *,
    method: Literal["sketch", "dense"] = "sketch",
    passes: int = 4,
    width: int = 12,
    tokens: Literal["reached", "all"] = "reached",
) -> dict[str, Stats]:
    """Returns statistics from a few batches for the targets whose init needs them.

    The gradient is the mean over the batches. Every pass sees the same batches, so
    `loss_fn` must be deterministic.

    Activations are counted wherever a kernel is applied to them on the way to the loss:
    a row of `x` in `x @ W` is a token, and each layer of a stack and each expert has
    its own rows. A convolution reads windows. A transposed use (`x @ W.T`) does not
    count, because it reads what the kernel writes; nor does a use under
    `stop_gradient`.

    Args:
      key: a typed key; only the sketch draws from it.
      loss_fn: `(params, batch) -> loss` or `(loss, anything)`, for plain parameters.
      params: the pretrained tree with any sharding, or a `Base`.
      targets: the targets to pass to `lorax.init`.
      batches: a few batches, read once and kept. LoRA-GA's library uses 64 batches of
        two examples, its paper 8 of one.
      kernels: from `lorax.discover`.
      method: "sketch" needs the memory of one LoRA backward pass of rank
        `width * rank`; "dense" forms every gradient (for activations, every
        covariance) and decomposes it exactly, for reference.
      passes: how many passes the sketch makes over the batches, an even number.
      width: columns of the sketch per rank, at least 2. With 4 passes, a width of 12
        keeps 0.998 of the exact energy and 0.999 of the first step's cosine with the
        gradient where singular values fall as slowly as i^-0.5; a width of 4 does
        where they fall as i^-1. For activations they are squared, so fall twice as
        fast.
      tokens: which rows of the activations count. "reached": rows whose result affects
        the loss, that is, where its gradient is not exactly zero. This leaves out
        padding that nothing attends to, tokens routed to another expert and, in the
        last layer, positions without a target. "all": every row, padding included.

    Returns:
      `{path: statistics}`, each of the kind that the target's init needs. "gradient":
      a `GradSketch` with `min(2 rank, in, out)` triplets. "activation":
      `ActivationStats` with `min(2 rank, in)` components. "covariance": a `Covariance`,
      `[*batch, in, in]` in float32, in one pass that needs three times their size.

    Raises:
      ValueError: no target with an init that looks at data, no batches, batches of
        different forms, an odd number of passes, a width below 2, an unknown method,
        covariances of more than 8 GiB in total, or a kernel whose activations cannot be
        determined (an embedding lookup, a use of part of its inputs, a custom
        derivative rule around more than a linear operation).
      TypeError: a single batch where a list is expected.

    Example:
      >>> params = {"w": jnp.eye(3)}
      >>> loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]))
      >>> target = Target("w", rank=1, init="eva")
      >>> x = jnp.array([[2.0, 0.0, 1.0], [-2.0, 0.0, 1.0]])
      >>> stats = calibrate(jax.random.key(0), loss, params, target, [x])
      >>> abs(stats["w"].u[:, 0]).round(3).tolist(), stats["w"].s.round(3).tolist()
      ([1.0, 0.0, 0.0], [2.0, 0.0])
    """
    if method not in ("sketch", "dense"):
        raise ValueError(f"method={method!r}; choose 'sketch' or 'dense'")
    if type(passes) is not int or passes < 2 or passes % 2:
        raise ValueError(f"passes={passes!r}; give an even number of at least 2")
    if type(width) is not int or width < KEPT:
        raise ValueError(f"width={width!r}; give a whole number of at least {KEPT}")
    if tokens not in ("reached", "all"):
        raise ValueError(f"tokens={tokens!r}; choose 'reached' or 'all'")
    params, _ = tree.split(params)
    chosen = _chosen(params, targets, kernels)
    data = _listed(batches)
    stats: dict[str, Stats] = {}
    if own := chosen.get("gradient"):
        total = _summed(transform.adapt(loss_fn), params, data)

        def mean(adapters: Any) -> Any:
            return jax.tree.map(lambda g: g / len(data), total(adapters))

        dense = method == "dense"
        stats |= _dense(mean, own) if dense else _sketch(key, mean, own, passes, width)
    every = tokens == "all"
    if own := chosen.get("activation"):
        total = _summed(activations.observed(loss_fn, own, every), params, data)
        if method == "dense":
            stats |= activations.decomposed(total, own)
        else:
            stats |= activations.principal(key, total, own, passes, width)
    if own := chosen.get("covariance"):
        total = _summed(activations.observed(loss_fn, own, every), params, data)
        stats |= activations.covariances(total, own)
    return stats


def _chosen(
    params: PyTree,
    targets: Rule | Iterable[Rule],
    kernels: Mapping[str, Kernel] | None,
) -> dict[str, Chosen]:
    """The kernels whose init looks at data, by the kind of statistics it needs."""
    chosen: dict[str, Chosen] = {}
    for path, (target, kernel) in select(params, targets, kernels).items():
        inits.check(target)
        inits.require_value(kernel, target)
        if asked := inits.of_target(target).stats:
            chosen.setdefault(asked, {})[path] = target, kernel
    if not chosen:
        using = [name for name, init in inits.REGISTRY.items() if init.stats]
        raise ValueError(
            "no target has an init that looks at data; calibrate is only needed for "
            f"init={' or '.join(map(repr, using))}"
        )
    return chosen


def _listed(batches: Any) -> list[Any]:
    """Returns the batches; raises for a single batch, whole or in pieces."""
    one = not isinstance(batches, Iterable) or isinstance(batches, Mapping | str)
    if one or hasattr(batches, "shape") or hasattr(batches, "_fields"):
        raise TypeError(
            f"batches is a single batch, {_form(batches)}: give a list, [batch] or "
            "[first, second]"
        )
    data = list(batches)
    if not data:
        raise ValueError(
            "batches is empty: give at least one batch of the training data (an "
            "iterator that was already read has none left)"
        )
    for i, batch in enumerate(data[1:], 1):
        if _form(batch) != _form(data[0]):
            raise ValueError(
                f"batches[0] is {_form(data[0])} and batches[{i}] is {_form(batch)}, "
                "but batches may differ only in sizes. If these are the parts of one "
                "batch, give [(first, second)] or whatever loss_fn takes"
            )
    return data


def _form(batch: Any) -> str:
    """The structure, dtypes and numbers of axes of a batch, as text."""

    def leaf(x: Any) -> str:
        if hasattr(x, "dtype") or isinstance(x, int | float):
            return f"{jnp.result_type(x)}[{', '.join(':' * jnp.ndim(x))}]"
        return type(x).__name__

    return str(jax.tree.map(leaf, batch))


def _summed(
    fn: Callable[..., Any], params: PyTree, data: list[Any]
) -> Callable[[Any], Any]:
    """Returns the gradient in `fn`'s first argument, summed over batches; one jit."""

    def loss(trained: Any, params: PyTree, batch: Any) -> jax.Array:
        out = fn(trained, params, batch)
        return out[0] if isinstance(out, tuple) else out

    gradient = jax.jit(jax.grad(loss))
    add = jax.jit(lambda total, more: jax.tree.map(jnp.add, total, more))

    def summed(trained: Any) -> Any:
        total = gradient(trained, params, data[0])
        for batch in data[1:]:
            total = add(total, gradient(trained, params, batch))
        return total

    return summed


def _width(times: int, kernel: Kernel, target: Target) -> int:
    in_, out, _ = making.sizes(kernel, target)
    return min(times * target.rank, math.prod(in_), math.prod(out))


def _sketch(
    key: jax.Array,
    mean: Callable[[Adapters], Adapters],
    chosen: Chosen,
    passes: int,
    width: int,
) -> dict[str, GradSketch]:
    """Subspace iteration on all kernels at once."""
    a, b = {}, {}
    for path, (target, kernel) in chosen.items():
        in_, out, batch = making.sizes(kernel, target)
        k = _width(width, kernel, target)
        a[path] = jnp.zeros((*batch, math.prod(in_), k))
        own = tree.fold_path(key, path)
        b[path] = jax.random.normal(own, (*batch, k, math.prod(out)))

    def gradient(a: dict, b: dict, field: str) -> dict[str, jax.Array]:
        probes: Adapters = {}
        for path, (target, kernel) in chosen.items():
            both = making.unflatten(kernel, target, a[path], b[path])
            axes = kernel.linear_axes()
            probes[path] = Lora(*both, 1.0, axes, 0.0, target.layers)
        found = mean(probes)
        flat = a if field == "a" else b
        return {p: getattr(g, field).reshape(flat[p].shape) for p, g in found.items()}

    none = jax.tree.map(jnp.zeros_like, (a, b))
    for _ in range(passes // 2):
        a = jax.tree.map(linalg.orthonormal, gradient(none[0], b, "a"))
        b = small = gradient(a, none[1], "b")
        b = jax.tree.map(lambda z: linalg.orthonormal(z.mT).mT, b)
    stats = {}
    for path, (target, kernel) in chosen.items():
        u, s, vt = linalg.svd(small[path], _width(KEPT, kernel, target))
        u = jnp.matmul(a[path], u, precision=linalg.EXACT)
        u, vt = making.unflatten(kernel, target, u, vt)
        stats[path] = GradSketch(u, s, vt)
    return stats


def _dense(
    mean: Callable[[Adapters], Adapters], chosen: Chosen
) -> dict[str, GradSketch]:
    """Exact decompositions of whole gradients."""
    leaves: Adapters = {
        path: Full(jnp.asarray(kernel.value, jnp.float32))
        for path, (_, kernel) in chosen.items()
    }
    stats = {}
    for path, found in mean(leaves).items():
        target, kernel = chosen[path]
        (value,) = jax.tree.leaves(found)
        held = dataclasses.replace(kernel, value=value)
        matrix = making.matrices(held, target)
        u, s, vt = linalg.svd(matrix, _width(KEPT, kernel, target))
        u, vt = making.unflatten(kernel, target, u, vt)
        stats[path] = GradSketch(u, s, vt)
    return stats
