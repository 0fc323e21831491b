"""A training state as flat arrays with a description, and back.

describe(state)   JSON data: adapters with their static fields; the leaves' entries
stored_under(...) the names of the leaves in the checkpoint, where they differ
check(...)        compares a description with a template and names what differs
spoiled(...)      names NaN and infinities that the previous state did not have
place(...)        arrays as a state, on the template's shardings
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from lorax.checkpoint import digests, entries, storage
from lorax.training import TrainState
from lorax.types import PyTree

Masks = dict[str, np.ndarray]
"""True where a leaf is not finite; leaves that are finite throughout have no entry."""

RENAMED = {"count": "step"}
"""Fields of optimiser states and their names in older checkpoints: the update counts of
`lora_plus`, `lora_pro`, `lora_rite` and `split_decay`."""


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


def describe(state: TrainState) -> dict[str, Any]:
    """Returns the description as JSON data.

    Args:
      state: concrete or abstract. If a leaf is sharded across processes, every process
        must call this.
    """
    adapters = {p: entries.describe(p, a) for p, a in state.adapters.items()}
    return {"adapters": adapters, "leaves": digests.describe(leaves_of(state))}


def check(then: Mapping[str, Any], template: TrainState) -> None:
    """Raises ValueError naming how the template differs from a description.

    Adapters are checked first: a different rank also changes the optimiser's state, and
    the error should name where the difference comes from.
    """
    skeleton = {p: entries.skeleton(e) for p, e in then["adapters"].items()}
    skeleton = entries.filled(skeleton, then["adapters"], template.adapters)
    entries.check_template(skeleton, template.adapters)
    ours, theirs = then["leaves"], leaves_of(template)
    if differing := sorted(ours.keys() ^ theirs.keys()):
        where = "checkpoint" if differing[0] in ours else "template"
        raise ValueError(
            f"{differing[0]}: only the {where} has it ({len(differing)} leaves "
            "differ); the optimiser or the model is different"
        )
    for name, leaf in theirs.items():
        if differs := digests.difference(ours[name], digests.kind(leaf)):
            field, old, new = differs
            raise ValueError(
                f"{name}: the checkpoint has {field}={old} and the template "
                f"{field}={new}"
            )


def stored_under(stored: Iterable[str], template: TrainState) -> dict[str, str]:
    """Returns `{name: name in the checkpoint}` for every stored leaf.

    The key is today's name of a field of an optimiser's state, even if it had another
    one when the checkpoint was written (`RENAMED`).

    Example:
      >>> state = {"opt_state": {"count": 0, "mu": 0}}
      >>> stored_under(["opt_state/step", "opt_state/mu"], state)
      {'opt_state/mu': 'opt_state/mu', 'opt_state/count': 'opt_state/step'}
    """
    there, wanted = list(stored), leaves_of(template)
    found = {name: name for name in there}
    for name in wanted:
        owner, _, field = name.rpartition("/")
        before = f"{owner}/{RENAMED.get(field, field)}"
        if name not in found and before in found and before not in wanted:
            found[name] = found.pop(before)
    return found


def not_finite(leaves: Mapping[str, Any]) -> Masks:
    """Returns where the floating leaves hold NaN or an infinity.

    Args:
      leaves: by name, sharded or not. Only the masks of non-finite leaves are gathered.

    Example:
      >>> not_finite({"a": np.ones(2), "best": np.array([1.0, np.inf])})
      {'best': array([False,  True])}
    """
    floating = {n: x for n, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    finite = {name: storage.is_finite(leaf) for name, leaf in floating.items()}
    some = [name for name, every in finite.items() if not storage.on_host(every)]
    return {name: storage.on_host(~jnp.isfinite(floating[name])) for name in some}


def spoiled(leaves: Mapping[str, Any], before: Masks | None) -> str:
    """Returns what is wrong with values that are about to be saved; "" if nothing.

    Args:
      leaves: by name, as for `not_finite`.
      before: where the previously saved or restored state was not finite, and may
        remain so. None: there was no such state. Optimiser and model may then start
        with infinities, such as the best value of a plateau schedule, but not with NaN,
        and adapters must be finite.
    """
    for name, mask in not_finite(leaves).items():
        if before is not None:
            mask = mask & ~before.get(name, np.zeros_like(mask))
        elif not name.startswith("adapters/"):
            mask = storage.on_host(jnp.isnan(leaves[name]))
        if count := int(mask.sum()):
            return f"{name}: {count} of its {mask.size} values are NaN or infinite"
    return ""


def place(arrays: Mapping[str, Any], template: TrainState) -> TrainState:
    """Returns a state with the template's structure, shardings and key types.

    Args:
      arrays: whole arrays in host memory, by name; the same on every process.
      template: arrays or `jax.ShapeDtypeStruct`. Leaves without a sharding, and arrays
        that are not committed to a device, give uncommitted arrays.
    """
    placed = [
        _placed(np.asarray(arrays[name]), leaf)
        for name, leaf in leaves_of(template).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), placed)


def _placed(array: np.ndarray, leaf: Any) -> jax.Array:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not getattr(leaf, "committed", True):
        made = jnp.array(array)
    else:
        made = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    if not storage.is_key(leaf):
        return made
    return jax.random.wrap_key_data(made, impl=_impl(leaf))


def _impl(key: Any) -> str:
    """The name of the generator, as passed to `jax.random.key`."""
    if isinstance(key, jax.Array):
        return str(jax.random.key_impl(key))
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda n=name: jax.random.key(0, impl=n)).dtype == key.dtype:
            return name
    raise ValueError(f"the template's key has the unknown type {key.dtype}")
