"""A training state as flat arrays with a description, and back.

describe(state)   JSON data: adapters with their static fields; of every leaf shape,
                  dtype and digest
check(...)        a description against a template: what differs is named
verify(...)       arrays against a description: damage is named
spoiled(...)      arrays against those saved before: NaN and infinities are named
place(...)        arrays as a state, on the template's shardings
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from lorax.checkpoint import digests, entries
from lorax.checkpoint.record import DamagedError
from lorax.training import TrainState
from lorax.types import PyTree

Host = dict[str, np.ndarray]
Masks = dict[str, np.ndarray]
"""Of leaves that are not finite: true where. The others have no entry."""


def leaves_of(state: PyTree) -> dict[str, Any]:
    """Returns `{name: leaf}`; ValueError if two leaves share a name.

    Example:
      >>> leaves_of({"mu": [1, 2]})
      {'mu/0': 1, 'mu/1': 2}
    """
    named = {}
    for key_path, leaf in jtu.tree_flatten_with_path(state)[0]:
        name = jtu.keystr(key_path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"two leaves of the state have the name {name!r}")
        named[name] = leaf
    return named


def describe(state: TrainState, host: Host | None = None) -> dict[str, Any]:
    """Returns the description as JSON data.

    Args:
      state: of arrays, or abstract.
      host: its leaves in host memory, for the digests; None describes without.
    """
    leaves = {name: _kind(leaf) for name, leaf in leaves_of(state).items()}
    for name, array in (host or {}).items():
        leaves[name]["digest"] = digests.of(array)
    adapters = {p: entries.describe(p, a) for p, a in state.adapters.items()}
    return {"adapters": adapters, "leaves": leaves}


def check(then: Mapping[str, Any], template: TrainState) -> None:
    """Raises ValueError naming how the template differs from a description.

    Adapters first: another rank shows in the optimiser's state as well, and is better
    named where it comes from.
    """
    skeleton = {p: entries.skeleton(e) for p, e in then["adapters"].items()}
    skeleton = entries.filled(skeleton, then["adapters"], template.adapters)
    entries.check_template(skeleton, template.adapters)
    ours, theirs = then["leaves"], describe(template)["leaves"]
    if differing := sorted(ours.keys() ^ theirs.keys()):
        where = "checkpoint" if differing[0] in ours else "template"
        raise ValueError(
            f"{differing[0]}: only the {where} has it ({len(differing)} differ); "
            "the optimiser or the model is another"
        )
    for name, kind in theirs.items():
        for field, value in kind.items():
            if ours[name][field] != value:
                raise ValueError(
                    f"{name}: the checkpoint has {field}={ours[name][field]} and the "
                    f"template {field}={value}"
                )


def verify(then: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Raises DamagedError naming the first array that is not as entries."""
    for name, entry in then["leaves"].items():
        array = arrays.get(entries.item_name(name))
        if not isinstance(array, np.ndarray):
            raise DamagedError(f"{name} is missing")
        if digests.of(array) != entry["digest"]:
            raise DamagedError(f"{name} is damaged: its digest is another")


def not_finite(host: Mapping[str, Any]) -> Masks:
    """Returns where the floating leaves hold NaN or an infinity.

    Example:
      >>> not_finite({"a": np.ones(2), "best": np.array([1.0, np.inf])})
      {'best': array([False,  True])}
    """
    floating = {n: x for n, x in host.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    masks = {name: ~np.isfinite(array) for name, array in floating.items()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def spoiled(host: Host, before: Masks | None) -> str:
    """Returns what is wrong with numbers that are about to be saved; "" if nothing.

    Args:
      host: leaves by name.
      before: where the state saved or restored before was not finite, and may stay so.
        None: there was none. Optimiser and model may then start at an infinity, such as
        the best value of a plateau's schedule; NaN is wrong at once, and adapters are
        always finite.
    """
    for name, mask in not_finite(host).items():
        if before is not None:
            mask = mask & ~before.get(name, np.zeros_like(mask))
        elif not name.startswith("adapters/"):
            mask = np.isnan(host[name])
        if count := int(mask.sum()):
            return f"{name} has {count} of {mask.size} values that are NaN or infinite"
    return ""


def place(arrays: Mapping[str, Any], template: TrainState) -> TrainState:
    """Returns a state of the template's structure, shardings and key types.

    Args:
      arrays: whole arrays in host memory, by item name; the same on every process.
      template: of arrays or `jax.ShapeDtypeStruct`. Leaves without a sharding, and
        arrays that are bound to no device, give arrays that are bound to none.
    """
    placed = [
        _placed(np.asarray(arrays[entries.item_name(name)]), leaf)
        for name, leaf in leaves_of(template).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), placed)


def _placed(array: np.ndarray, leaf: Any) -> jax.Array:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not getattr(leaf, "committed", True):
        made = jnp.array(array)
    else:
        made = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    if not digests.is_key(leaf):
        return made
    return jax.random.wrap_key_data(made, impl=_impl(leaf))


def _impl(key: Any) -> str:
    """The name of the generator, as `jax.random.key` takes it."""
    if isinstance(key, jax.Array):
        return str(jax.random.key_impl(key))
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda n=name: jax.random.key(0, impl=n)).dtype == key.dtype:
            return name
    raise ValueError(f"the template's key has the unknown type {key.dtype}")


def _kind(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
