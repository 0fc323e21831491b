"""The cost of merging: the rounding error of every merged kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import linalg, transform, tree
from lorax.types import Adapters, PyTree


class MergeError(NamedTuple):
    """What one kernel loses when the merged value is rounded.

    Attributes:
      max: the largest absolute error of an entry.
      relative: the Frobenius norm of the error over that of the exact merged kernel.
      lost: the same over that of the update: 0.01 means that one per cent of what was
        learned is rounding noise, 1 that all of it is lost. `inf` where there is no
        update and the base itself is rounded.
    """

    max: float
    relative: float
    lost: float


def merge_report(
    adapters: Adapters, params: PyTree, dtype: Any = None
) -> dict[str, MergeError]:
    """Measures what `merge` rounds away, by path.

        error = round(W + delta) - (W + delta)

    with `W + delta` summed in float64 on the host, one leaf at a time. bfloat16 has 8
    bits of precision, so an entry's update below about 1/256 of the entry is lost. A
    quantised leaf is rounded to codes, as in `merge(..., requantize=True)`.

    Args:
      adapters: `{path: Adapter}`.
      params: the tree they were made for, with concrete arrays.
      dtype: the dtype to cast merged kernels to, quantised ones included; by default
        each leaf's own dtype, or its codes.

    Returns:
      `{path: MergeError}`.

    Raises:
      ValueError: integers or 8-bit floats that are not a `quantized.Quantized` leaf, a
        dtype that is not floating, or an adapter that does not fit.
      KeyError: a path that params lacks.

    Example:
      >>> import lorax
      >>> lora = lorax.Lora(
      ...     jnp.ones((1, 1)), jnp.full((1, 1), 2.0**-9), 1.0, lorax.Axes((0,), (1,))
      ... )
      >>> params = {"w": jnp.ones((1, 1), jnp.bfloat16)}  # 1 + 2^-9 rounds to 1
      >>> merge_report({"w": lora}, params)["w"].lost
      1.0
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype}; give a floating dtype to merge into")
    if isinstance(adapters, Mapping):  # anything else: `check` says what it is
        _require_floating(adapters, params)
    whole, leaves = transform.check(adapters, params)
    with jax.ensure_compile_time_eval():  # known arrays, closed over by a jit
        return {
            path: _measured(adapter, leaves[path], dtype)
            for path, adapter in whole.items()
        }


def _require_floating(adapters: Adapters, params: PyTree) -> None:
    """Raises ValueError for adapters on integer or 8-bit leaves."""
    leaves = tree.flatten(params)
    for path in adapters:
        inside = [known for known in leaves if known.startswith(f"{path}/")]
        held = [leaves[path]] if path in leaves else [leaves[k] for k in inside]
        dtypes = [jnp.dtype(leaf.dtype) for leaf in held if hasattr(leaf, "dtype")]
        small = [
            dtype
            for dtype in dtypes
            if jnp.issubdtype(dtype, jnp.integer) or dtype.itemsize == 1
        ]
        if small:
            where = path if path in leaves else f"{path} (stored as {inside})"
            raise ValueError(
                f"{where}: the base is quantised ({', '.join(map(str, small))}) in a "
                "format that lorax does not read, so an update cannot be rounded into "
                "it; convert it to a lorax.quantized.Quantized leaf, or dequantise the "
                "leaf to bfloat16 or float32, adapt that and merge into it"
            )


def _measured(adapter: Any, leaf: Any, dtype: Any) -> MergeError:
    dense = jnp.asarray(leaf)
    if tree.is_quantized(leaf) and dtype is None:
        rounded = jnp.asarray(transform.folded(adapter, leaf, requantize=True))
    else:
        to = dense.dtype if dtype is None else jnp.dtype(dtype)
        rounded = adapter.merge(linalg.widened(dense)).astype(to)
    exact = np.asarray(dense, np.float64)
    delta = np.asarray(adapter.delta(dense), np.float64)
    exact = exact + delta
    error = np.asarray(rounded, np.float64) - exact
    size = float(np.linalg.norm(error))

    def relative_to(whole: np.ndarray) -> float:
        norm = float(np.linalg.norm(whole))
        return size and (size / norm if norm else np.inf)

    return MergeError(
        float(np.abs(error).max(initial=0.0)), relative_to(exact), relative_to(delta)
    )
