"""Path-named trees: a parameter tree seen as an ordered dict `{path: leaf}`.

A path joins the keys of the tree path with `/`. Suffixes that only wrap a leaf (the
`value` of a `flax.linen` box or an `nnx.Variable`) and the leading `params/` of a
variables dict are dropped; sequence indices are decimal. The tree of a `Base` is its
parameters, and a quantised leaf counts as one leaf.
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from lorax.quantized import is_quantized
from lorax.types import Adapters, Base, PyTree


def path_name(key_path: tuple[Any, ...]) -> str:
    """Returns the path of a leaf from its `jax.tree_util` key path."""
    keys = list(key_path)
    while len(keys) > 1 and keys[-1] == jtu.GetAttrKey("value"):
        keys.pop()
    if len(keys) > 1 and keys[0] == jtu.DictKey("params"):
        keys.pop(0)
    return jtu.keystr(tuple(keys), simple=True, separator="/")


def split(params: PyTree) -> tuple[PyTree, Mapping[str, jax.Array]]:
    """Returns the parameters and frozen arrays (`{}` unless `params` is a `Base`)."""
    return params if isinstance(params, Base) else (params, {})


def flatten(tree: PyTree) -> dict[str, Any]:
    """Returns `{path: leaf}` in tree order.

    Args:
      tree: any pytree; of a `Base`, only the parameters.

    Returns:
      A dict from path to leaf.

    Raises:
      ValueError: two leaves share a path.

    Example:
      >>> flatten({"params": {"dense": {"kernel": 1}}, "steps": [2, 3]})
      {'dense/kernel': 1, 'steps/0': 2, 'steps/1': 3}
    """
    leaves: dict[str, Any] = {}
    plain, _ = split(tree)
    for key_path, leaf in jtu.tree_flatten_with_path(plain, is_leaf=is_quantized)[0]:
        path = path_name(key_path)
        if path in leaves:
            raise ValueError(
                f"two leaves of the tree have the path {path!r} (the second at "
                f"{jtu.keystr(key_path)}); rename one, or pass only the tree that "
                "holds the parameters"
            )
        leaves[path] = leaf
    return leaves


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Returns `tree` with the leaves at the given paths replaced.

    Args:
      tree: any pytree; a `Base` keeps its frozen arrays.
      leaves: new leaves by path; every path must exist.

    Returns:
      A tree with the same structure.

    Raises:
      KeyError: a path that the tree lacks.
    """
    if isinstance(tree, Base):
        return Base(replace(tree.params, leaves), tree.frozen)
    require(leaves, flatten(tree))
    return jtu.tree_map_with_path(
        lambda key_path, leaf: leaves.get(path_name(key_path), leaf),
        tree,
        is_leaf=is_quantized,
    )


def require(paths: Iterable[str], known: Mapping[str, Any], what: str = "tree") -> None:
    """Raises KeyError naming the first path that `known` lacks and the nearest ones."""
    for path in paths:
        if path not in known:
            raise KeyError(f"the {what} has no leaf {path!r}; {nearest(path, known)}")


def nearest(path: str, known: Iterable[str]) -> str:
    """Returns a phrase naming the known paths closest to `path`, for error messages."""
    known = list(known)
    close = difflib.get_close_matches(path, known, n=3, cutoff=0.0)
    if not close:
        return "it has no leaves at all"
    return "nearest paths: " + ", ".join(map(repr, close))


def match(pattern: str, path: str) -> bool:
    """True if the regular expression matches the whole path."""
    return re.fullmatch(pattern, path) is not None


def is_floating(leaf: Any) -> bool:
    """True for arrays (and their abstract forms) of a real floating dtype."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def is_coded(leaf: Any) -> bool:
    """True for arrays that may hold the codes of a kernel: integers, 8-bit floats."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or is_quantized(leaf) or not leaf.shape:
        return False
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.dtype(dtype).itemsize == 1
    return jnp.issubdtype(dtype, jnp.integer)


def require_adaptable(path: str, leaf: Any) -> None:
    """Raises ValueError for a leaf that cannot hold an update: integers, 8-bit floats.

    8-bit floats are the payload of a quantised kernel. Its scale may be applied after
    the product, and would then wrongly scale the low-rank branch, too.
    """
    dtype = jnp.dtype(leaf.dtype)
    if not is_floating(leaf):
        raise ValueError(
            f"{path}: the leaf has dtype {dtype}, and only floating leaves can be "
            "adapted; dequantise it to bfloat16 or float32, or leave it out"
        )
    if dtype.itemsize == 1:
        raise ValueError(
            f"{path}: the leaf is quantised ({dtype}), and an update can neither be "
            "rounded into it nor added beside its scale; dequantise it first (the "
            "leaf times its scale, in bfloat16 or float32), or leave it out "
            "(exclude= of the target)"
        )


def is_array(leaf: Any) -> bool:
    """True for JAX arrays (traced or not), and for numpy arrays of numbers or bools."""
    if not isinstance(leaf, np.ndarray):
        return isinstance(leaf, jax.Array)
    return jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool


def is_concrete(leaf: Any) -> bool:
    """True if the leaf's values can be read now: not a tracer, not a shape."""
    return hasattr(leaf, "__array__") and not isinstance(leaf, jax.core.Tracer)


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """Returns a key that depends only on `key` and `path`, not on other leaves."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def partition(
    adapters: Adapters, predicate: Callable[[str, Any], bool]
) -> tuple[Adapters, Adapters]:
    """Splits adapters in two by `predicate(path, adapter)`; `combine` undoes it."""
    chosen = {path: a for path, a in adapters.items() if predicate(path, a)}
    return chosen, {path: a for path, a in adapters.items() if path not in chosen}


def combine(*parts: Adapters) -> Adapters:
    """Joins disjoint adapter trees; a path in two of them is a ValueError."""
    whole: Adapters = {}
    for part in parts:
        if both := sorted(whole.keys() & part.keys()):
            raise ValueError(
                f"adapters given twice for {both}: pass each path once, or merge the "
                "adapters of a path into one"
            )
        whole |= part
    return whole


def map_adapters(function: Callable[[str, Any], Any], adapters: Adapters) -> dict:
    """Returns `{path: function(path, adapter)}`."""
    return {path: function(path, adapter) for path, adapter in adapters.items()}


def require_pure(params: PyTree) -> None:
    """Raises TypeError for an `nnx.Module`: parameters must be a tree of arrays."""
    from flax import nnx

    if isinstance(params, nnx.Module):
        raise TypeError(
            f"params is a {type(params).__name__}, an nnx module, but lorax needs a "
            "pure function of a tree: graphdef, state = nnx.split(model), then pass "
            "state as params and call nnx.merge(graphdef, state) inside the function"
        )
