"""Adapters extracted from two full checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax import adapters as adapter_classes
from lorax import tree
from lorax.adapters import layout, making
from lorax.compose import forms
from lorax.compose.forms import Combined
from lorax.kernels import Kernel
from lorax.selection import select
from lorax.targets import Rule, Target
from lorax.types import PyTree


def extract(
    params: PyTree,
    tuned: PyTree,
    targets: Rule | Iterable[Rule],
    kernels: Mapping[str, Kernel] | None = None,
) -> Combined:
    """Extracts adapters from two full checkpoints by an SVD of what training changed.

        a = U_r sqrt(S_r / s),    b = sqrt(S_r / s) V_r^T,    U S V^T = W_tuned - W

    Args:
      params: the tree before training.
      tuned: the tree after training, of the same structure and shapes.
      targets: rules as for `lorax.init`; rank, alpha, scaling, dtype, layers and the
        parametrisation are used, the init is ignored. "full" takes the tuned leaf;
        "dora" takes the magnitude from the tuned kernel.
      kernels: from `discover`; needed by "all-linear" and for kernels that are not
        two-dimensional.

    Returns:
      The adapters, for `params`; and by path the Frobenius norm of the change they
      miss, relative to that of the whole change.

    Raises:
      ValueError: targets that `lorax.init` would refuse, or leaves of different shapes.
      KeyError: `tuned` lacks a path.

    Example:
      >>> base, tuned = {"w": jnp.zeros((3, 2))}, {"w": jnp.ones((3, 2))}
      >>> adapters, error = extract(base, tuned, ("w", 1))
      >>> adapters["w"].rank, bool(error["w"] < 1e-6)
      (1, True)
    """
    chosen = select(params, targets, kernels)
    for path, (_, kernel) in chosen.items():
        if kernel.leaves:
            raise ValueError(
                f"{path}: the program computes this kernel, so no leaf holds it; "
                "compute dense kernels of both checkpoints with the model's own code, "
                "and extract from those"
            )
    after = tree.flatten(tuned)
    tree.require(chosen, after, "tuned tree")
    adapters, error = {}, {}
    for path, (target, kernel) in chosen.items():
        leaf = jnp.asarray(after[path])
        if leaf.shape != kernel.shape:
            raise ValueError(
                f"{path}: params has shape {kernel.shape} and tuned {leaf.shape}; give "
                "two checkpoints of one model"
            )
        adapters[path], error[path] = _extracted(target, kernel, leaf)
    return Combined(adapters, error)


def _extracted(target: Target, kernel: Kernel, tuned: Any) -> tuple[Any, jax.Array]:
    value = jnp.asarray(kernel.value)
    cls: Any = adapter_classes.of_target(target)
    whole = dataclasses.replace(kernel, value=tuned)  # Dora takes its norm
    if cls.replaces:
        return cls.make(None, whole, target, {}), jnp.zeros(())
    if not hasattr(cls, "from_triplets"):
        raise ValueError(
            f"{kernel.path}: extract writes the difference of checkpoints as a product "
            f"of factors, and adapter={target.adapter!r} is not one; use adapter='lora'"
        )
    dtype = layout.wide(value, tuned)
    change = tuned.astype(dtype) - value.astype(dtype)
    moved = dataclasses.replace(kernel, value=change)
    matrices = making.matrices(moved, target)
    batch = matrices.shape[:-2]
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    u, s, vt = (f.reshape(*batch, *f.shape[1:]) for f in _top(stack, target.rank))
    adapter = cls.from_triplets(whole, target, u, s / abs(target.scale), vt)
    missed = jnp.linalg.norm((change - adapter.delta(value)).ravel())
    return adapter, forms.relative(missed, jnp.linalg.norm(change.ravel()))


@functools.partial(jax.jit, static_argnums=1)
def _top(stack: jax.Array, rank: int) -> tuple[jax.Array, ...]:
    """The leading singular triplets of `[n, in, out]`, one matrix at a time."""
    return jax.lax.map(lambda matrix: forms.truncated(matrix, rank)[:3], stack)
