"""Orbax trees of other JAX programs: their leaves by name, and LoRA rules.

Shared by `maxtext` and `tunix`. A leaf's name is its path, "decoder/layers_0/norm": a
list item's number is appended to the name of the list, and the key "value", under which
nnx keeps a variable's array, is left out. MaxText names leaves in the same way
(`param_key_parts_from_path` in its checkpoint_conversion/utils/utils.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lorax import untrusted
from lorax.adapters import Lora
from lorax.checkpoint import storage
from lorax.interop import factors, files, peft_leaves, peft_moved
from lorax.interop.factors import Module
from lorax.interop.peft_base import Base
from lorax.types import Adapters


class Rule(NamedTuple):
    """What a LoRA tree itself does not contain: the fields of a `qwix.LoraRule`.

    Attributes:
      module_path: a regex that matches the modules with factors.
      rank: the rank of all of them.
      alpha: the update is alpha / rank times the product.
    """

    module_path: str
    rank: int
    alpha: float


def read(
    folder: str | os.PathLike[str], keep: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by name, in host memory.

    Args:
      folder: the folder of the tree itself, such as "run/0/items".
      keep: returns whether to read the leaf with a given name, for example to skip the
        optimiser's.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: Orbax finds no tree in it, or a leaf is not finite.
    """
    path = storage.folder_of(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            whole = reader.metadata(path).item_metadata.tree
        except Exception as error:  # orbax may raise anything for a wrong folder
            inside = sorted(child.name for child in path.iterdir())
            raise ValueError(
                f"{folder}: Orbax finds no tree in it; give the folder of the tree "
                "itself, such as 0/items for MaxText or 0/model_params for tunix. It "
                f"contains {untrusted.some(inside)}"
            ) from error
        chosen = _pruned(whole, keep)
        given = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), chosen)
        args = ocp.args.PyTreeRestore(chosen, given, partial_restore=True)
        found = _named(reader.restore(path, args=args)) if chosen else {}
    if odd := [name for name, leaf in found.items() if not files.is_finite(leaf)]:
        raise ValueError(f"{folder}: {odd[0]!r} holds NaN or infinity")
    return found


def write(
    folder: str | os.PathLike[str],
    item: str,
    tree: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a tree as step 0 of a folder, under the item's name.

    Raises:
      ValueError: the folder already has a step 0.
    """
    path = storage.folder_of(folder)
    if (path / "0").exists():
        raise ValueError(f"{folder} already has a step 0; give another folder")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    with ocp.CheckpointManager(path, item_handlers={item: handler}) as manager:
        args = ocp.args.Composite(**{item: ocp.args.PyTreeSave(dict(tree))})
        manager.save(0, args=args, custom_metadata=dict(metadata or {}))


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Returns the leaves as a tree of nested dicts."""
    found: dict[str, Any] = {}
    for keys, leaf in leaves.items():
        inner = found
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = leaf
    return found


def names_of(base: Base) -> dict[tuple[str, int | None], str]:
    """Returns the modules of a model by their place here: `("q/kernel", layer)`.

    The layer is None for modules outside the layers, such as `("head/kernel", None)`.
    """
    found: dict[tuple[str, int | None], str] = {}
    for name, place in base.modules.items():
        first, _, rest = place.path.partition("/")
        if not first.startswith("layers"):
            found[place.path, None] = name
        elif place.layer is not None:
            found[rest, place.layer] = name
        else:
            found[rest, int(first.removeprefix("layers_"))] = name
    return found


def uniform(adapters: Adapters, base: Base, who: str) -> list[Module]:
    """Returns the modules of Lora adapters, all at a common rank and scale.

    Raises:
      ValueError: there are no adapters or other kinds, or an init changed the base.
    """
    for path, adapter in adapters.items():
        if type(adapter) is not Lora:
            raise ValueError(
                f"{path}: {who} stores only LoRA, and this is "
                f"{type(adapter).__name__}; merge it (lorax.merge), or extract a Lora "
                "(lorax.compose.extract)"
            )
        adapter.check(path, base.shapes[path])
    if not adapters:
        raise ValueError("there are no adapters to write")
    peft_moved.refuse(adapters)
    modules, _ = peft_leaves.split(adapters, base)
    return factors.alike(modules)


def pairs(
    found: Mapping[str, np.ndarray], ends: tuple[str, str], folder: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns a and b by their common prefix, float32.

    Raises:
      ValueError: leaves are not LoRA parameters, one of a pair is missing, or there are
        none.
    """
    if odd := sorted(name for name in found if not name.endswith(ends)):
        raise ValueError(
            f"{folder}: {untrusted.some(odd)}: leaves that are not LoRA parameters "
            f"(*{ends[0]}, *{ends[1]}); save only the LoRA parameters"
        )
    begins = sorted({name.removesuffix(end) for name in found for end in ends})
    begins = [name for name in begins if not name.endswith(ends)]
    for name in begins:
        for end in ends:
            if name + end not in found:
                raise ValueError(
                    f"{folder}: {name + end!r} is missing, the other of a pair"
                )
    if not begins:
        raise ValueError(f"{folder}: the tree has no LoRA parameters")
    as_float = lambda name: found[name].astype(np.float32)
    return {n: (as_float(n + ends[0]), as_float(n + ends[1])) for n in begins}


def require_shape(
    where: str, found: Sequence[int], want: Sequence[int], config: Any
) -> None:
    """Raises ValueError unless a leaf has the shape that a config requires."""
    if tuple(found) != tuple(want):
        raise ValueError(
            f"{where} has shape {tuple(found)}, but {config.model_type!r} with "
            f"width={config.width}, layers={config.layers}, heads={config.heads}, "
            f"kv_heads={config.kv_heads} requires {tuple(want)}"
        )


def _name(path: Sequence[Any]) -> str:
    """The name of a leaf, as described above."""
    parts: list[str] = []
    for entry in path:
        key = str(getattr(entry, "key", getattr(entry, "idx", entry)))
        if key.isdecimal() and parts:
            parts[-1] += f"_{key}"
        else:
            parts.append(key)
    return "/".join(parts[:-1] if parts[-1:] == ["value"] else parts)


def _named(tree: Any) -> dict[str, Any]:
    return {_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _pruned(tree: Any, keep: Callable[[str], bool]) -> dict[str, Any]:
    """The tree with only the leaves to keep."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return nested(
        {
            tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): leaf
            for path, leaf in leaves
            if keep(_name(path))
        }
    )
