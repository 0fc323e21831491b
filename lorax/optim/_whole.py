"""Singular directions of whole kernels, by power iteration across steps.

    v <- W^T W v / |W^T W v|

Each step takes one product with W^T and two with W; from step to step v follows the
kernel. The kernel of an adapter is `(W0 + a b) * gain`, multiplied factor by factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax import _checks, tree
from lorax.adapters import as_lora, bound, layout
from lorax.kernels import Kernel
from lorax.linalg import EXACT
from lorax.optim import _trees
from lorax.types import Adapters, Axes, PairStatics, PyTree

WARM = 20  # power iterations at init, where the leaf is available


class Leaf(NamedTuple):
    """A leaf seen as a stack of matrices."""

    value: jax.Array  # [n, in, out], at least float32
    axes: Axes
    shape: tuple[int, ...]


def leaves(params: PyTree, kernels: Mapping[str, Kernel] | None) -> dict[str, Leaf]:
    """Returns the matrices of a plain tree, or of the Full leaves of an adapter tree.

    Raises:
      ValueError: a leaf of more than two dimensions with unknown axes; no matrices.
    """
    if isinstance(params, Mapping) and any(
        hasattr(a, "roles") for a in params.values()
    ):
        found = {p: a.value for p, a in params.items() if a.replaces}
    else:
        found = tree.flatten(params)
    matrices = {}
    for path, leaf in found.items():
        if not tree.is_floating(leaf) or leaf.ndim < 2:
            continue
        axes = Axes((0,), (1,))
        if kernels is not None and path in kernels:
            if kernels[path].axes is None:
                continue
            axes = kernels[path].linear_axes()
        elif leaf.ndim > 2:
            raise ValueError(
                f"{path}: the shape {leaf.shape} does not say which axes are read and "
                "which are written; pass kernels=lorax.discover(loss_fn, params, batch)"
            )
        matrices[path] = Leaf(_matrix(leaf, axes), axes, leaf.shape)
    if not matrices:
        raise ValueError(
            "target='param' found no matrix: give the parameter tree, or adapters with "
            "Full leaves (for low-rank adapters use target='delta')"
        )
    return matrices


def _matrix(leaf: jax.Array, axes: Axes) -> jax.Array:
    """Returns the leaf as `[n, in, out]` in at least float32."""
    matrices = layout.matrices(leaf, axes)
    return matrices.reshape(-1, *matrices.shape[-2:])


def _as_leaf(matrix: jax.Array, leaf: Leaf) -> jax.Array:
    in_, out, batch = leaf.axes.sizes(leaf.shape)
    return layout.in_leaf_order(matrix.reshape(*batch, *in_, *out), leaf.axes)


def _direction(path: str, n: int, out: int) -> jax.Array:
    v = jax.random.normal(tree.fold_path(jax.random.key(0), path), (n, out))
    return _unit(v)


def _unit(v: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(v, axis=-1, keepdims=True)
    return v / jnp.where(norm > 0, norm, 1)


def start(matrices: Mapping[str, Leaf]) -> dict[str, jax.Array]:
    """Returns v, `[n, out]`, for every path, after some warm-up iterations."""
    found = {}
    for path, leaf in matrices.items():
        v = _direction(path, leaf.value.shape[0], leaf.value.shape[2])
        found[path] = _warm(leaf.value, v)
    return found


def _warm(w: jax.Array, v: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, WARM, lambda _, v: _iterate(w, v)[0], v)


def leaf_decay(
    matrices: Mapping[str, Leaf], v: Mapping[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns `W v v^T = sigma_1 u_1 v_1^T` for every leaf, and the new v."""
    decay, after = {}, {}
    for path, leaf in matrices.items():
        new, wv = _iterate(leaf.value, v[path])
        decay[path] = _as_leaf(wv[..., :, None] * new[..., None, :], leaf)
        after[path] = new
    return decay, after


def leaf_excess(
    matrices: Mapping[str, Leaf], v: Mapping[str, jax.Array], tau: _checks.Number
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns `max(sigma_1 - tau, 0) u_1 v_1^T` for every leaf, and the new v."""
    excess, after = {}, {}
    for path, leaf in matrices.items():
        new, wv = _iterate(leaf.value, v[path])
        sigma = jnp.linalg.norm(wv, axis=-1, keepdims=True)
        over = jnp.maximum(sigma - tau, 0) / jnp.where(sigma > 0, sigma, 1)
        excess[path] = _as_leaf((over * wv)[..., :, None] * new[..., None, :], leaf)
        after[path] = new
    return excess, after


def _iterate(w: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One power iteration on `[n, in, out]`: the new v, and W v."""

    def times(v: jax.Array) -> jax.Array:
        return jnp.einsum("nio,no->ni", w, v, precision=EXACT)

    v = _unit(jnp.einsum("ni,nio->no", times(v), w, precision=EXACT))
    return v, times(v)


def changed(
    updates: PyTree, found: Mapping[str, jax.Array], change: Callable
) -> PyTree:
    """Returns updates with `change(update, found)` applied at the paths of `found`."""
    flat = tree.flatten(updates)
    return tree.replace(updates, {p: change(flat[p], x) for p, x in found.items()})


def start_merged(adapters: Adapters) -> dict[str, jax.Array]:
    """Returns a random unit vector `[n, out]` for every kernel with factors."""
    own = {
        path: adapter
        for path, adapter in adapters.items()
        if _trees.is_present(adapter) and not adapter.replaces
    }
    for path, adapter in own.items():
        if not _trees.is_pair(adapter) and adapter.as_lora() is None:
            raise ValueError(
                f"{path}: target='merged' multiplies by the kernel factor by factor, "
                f"but {type(adapter).__name__} is not a product of factors; decay "
                "this path with add_decayed_weights, through optax.partition"
            )
    return {path: _direction(path, *_sizes(adapter)) for path, adapter in own.items()}


def _sizes(adapter: Any) -> tuple[int, int]:
    """The number of matrices that have factors, and of their outputs."""
    plain = jax.eval_shape(as_lora, adapter)
    n = len(plain.axes.batch)
    return math.prod(plain.b.shape[:n]), math.prod(plain.b.shape[n + 1 :])


def merged_decay(
    adapters: Adapters,
    base: PyTree,
    pairs: Mapping[str, PairStatics] | None,
    v: Mapping[str, jax.Array],
) -> tuple[Adapters, dict[str, jax.Array]]:
    """Returns the gradient of `0.5 |merge(adapters, base)|_2^2`, and the new v.

    For fixed v it is the gradient of `0.5 |W v|^2`, for any parametrisation. Every
    field gets one, including AdaLoRA's singular values, except a DoRA magnitude. `Full`
    leaves get none, because they have no base kernel.

    Raises:
      ValueError: no base.
    """
    if base is None:
        raise ValueError(
            "target='merged' reads the frozen kernels: call tx.update(grads, state, "
            "adapters, base=params)"
        )
    kernels, (_, frozen), decay, after = tree.flatten(base), tree.split(base), {}, {}
    tree.require(v, kernels, "base")
    for path, adapter in adapters.items():
        own: Any = adapter
        decay[path] = jax.tree.map(jnp.zeros_like, adapter)
        if path not in v:
            continue
        if pairs is not None and path in pairs:
            own = own.replace(scale=pairs[path].scale)
        whole = bound(own, frozen, path)
        after[path], found = _merged(whole, kernels[path], v[path])
        still = [f for f, role in own.roles.items() if role == "magnitude"]
        decay[path] = own.replace(
            **{f: jnp.zeros_like(x) if f in still else x for f, x in found.items()}
        )
    return decay, after


def _merged(
    adapter: Any, leaf: jax.Array, v: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The new v of one kernel, and the gradients by field."""
    axes, layers = adapter.axes, adapter.layers
    if layers is not None:
        leaf = jnp.take(leaf, jnp.asarray(layers), axes.batch[0])
        adapter = adapter.replace(layers=None)
    w = _matrix(leaf, axes)
    fields = {f: getattr(adapter, f) for f in adapter.roles}

    def parts(fields: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        plain: Any = as_lora(adapter.replace(**fields))
        a, b, gain, *_ = plain.factors(leaf)
        n, rank = w.shape[0], a.shape[-1]
        gain = jnp.ones((n, w.shape[2])) if gain is None else gain.reshape(n, -1)
        return a.reshape(n, -1, rank), b.reshape(n, rank, -1), gain

    def times(fields: dict[str, jax.Array], v: jax.Array) -> jax.Array:
        a, b, gain = parts(fields)
        v = gain * v
        thin = jnp.einsum("nro,no->nr", b, v, precision=EXACT)
        low = jnp.einsum("nir,nr->ni", a, thin, precision=EXACT)
        return jnp.einsum("nio,no->ni", w, v, precision=EXACT) + low

    u = times(fields, v)
    a, b, gain = parts(fields)
    thin = jnp.einsum("ni,nir->nr", u, a, precision=EXACT)
    back = jnp.einsum("nr,nro->no", thin, b, precision=EXACT)
    v = _unit(gain * (jnp.einsum("ni,nio->no", u, w, precision=EXACT) + back))

    def energy(fields: dict[str, jax.Array]) -> jax.Array:
        return 0.5 * jnp.sum(times(fields, v) ** 2)

    return v, jax.grad(energy)(fields)
