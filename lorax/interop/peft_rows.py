"""Reads and writes PEFT's `trainable_token_indices`: trained rows of embeddings.

<module>.token_adapter.trainable_tokens_delta   [tokens, width]   next to factors
<module>.trainable_tokens_delta                 likewise          alone, its own type

PEFT stores the rows themselves, despite the tensor's name; an adapter here holds what
is added to the base's rows. For tied weights PEFT stores only the embedding's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax.adapters import Rows
from lorax.interop import factors, files
from lorax.interop.peft_base import WEIGHT, Base
from lorax.interop.peft_names import Names
from lorax.interop.peft_selection import ALWAYS_HARMLESS, PREFIX, ROWS_TYPE, Selection
from lorax.types import Adapters

ALONE = ".trainable_tokens_delta"
END = ".token_adapter" + ALONE
FIELD = "trainable_token_indices"


def modules(
    settings: Selection, base: Base, names: Names
) -> dict[str, tuple[int, ...]]:
    """Returns the numbers of the trained rows, by module.

    Raises:
      ValueError: a name matches no module or one that torch has several times, the
        vocabulary lacks a row, or only one of a tied pair is named.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, rows in settings.tokens.items():
        chosen = [
            module
            for module in base.modules
            if module.startswith(names.lacking) and names.of(module).endswith(name)
        ]
        chosen = chosen if name else [base.words]
        for module in chosen:
            found[module] = rows
            size = base.shape(base.matrix(module))[0]
            if max(rows) >= size:
                raise ValueError(
                    f"{FIELD} has {max(rows)}, but {module!r} of this base has {size} "
                    "rows; was the vocabulary extended? hf.resize_embeddings extends it"
                )
        if not chosen:
            raise ValueError(f"{FIELD} names {name!r}, but the base has no such module")
    return _untied(found, base)


def module_of(name: str) -> str:
    """Returns the module of a tensor's name."""
    return name.removesuffix(ALONE).removesuffix(".token_adapter")


def _untied(
    found: dict[str, tuple[int, ...]], base: Base
) -> dict[str, tuple[int, ...]]:
    """The rows without those of a tied head, which follows its embedding."""
    head = found.pop(base.head, None) if base.head else None
    if head is not None and found.get(base.embedding) != head:
        raise ValueError(
            f"{FIELD} has {base.head!r}, which is tied to {base.embedding!r}, but not "
            "the same rows of both; load the base with tied=False and set its "
            "head/kernel to the transposed embedding"
        )
    for module in found:
        if module != base.embedding:
            base.require_one(module)
    return found


def read(
    tensors: Mapping[str, files.Tensor],
    rows: Mapping[str, tuple[int, ...]],
    base: Base,
    params: Mapping[str, Any],
) -> Adapters:
    """Returns the adapters of the rows, by path.

    Args:
      tensors: `{module: tensor}`.
      rows: what `modules` returned.
      base: the model.
      params: leaves by path.

    Raises:
      ValueError: tensors are missing, left over or misshapen; or there are no
        parameters.
    """
    tensors = _without_head(tensors, base)
    if odd := sorted(tensors.keys() ^ rows.keys()):
        there = odd[0] in tensors
        raise ValueError(
            f"{odd[0] + END!r} is {'present' if there else 'absent'}, but {FIELD} "
            f"{'does not name' if there else 'names'} it"
        )
    if rows and not params:
        raise ValueError(
            f"{FIELD}: PEFT stores the rows, but an adapter here holds what is added "
            "to the base's rows; pass the base's parameters to peft.load as params="
        )
    found: Adapters = {}
    for module, tensor in tensors.items():
        key = base.matrix(module)
        size, width = base.shape(key)
        if tensor.shape != (len(rows[module]), width):
            raise ValueError(
                f"{tensor.key!r} has shape {list(tensor.shape)}, but {FIELD} and the "
                f"base require {[len(rows[module]), width]}"
            )
        tensor.require_floating()
        values = tensor.read().astype(np.float32)
        order = np.argsort(rows[module])
        own = tuple(int(rows[module][i]) for i in order)
        before = base.tensor(key, params)[list(own)].astype(np.float32)
        found[base.where[key].path] = _made(key, own, values[order] - before, base)
    return found


def _without_head(
    tensors: Mapping[str, files.Tensor], base: Base
) -> dict[str, files.Tensor]:
    """Drops the copy for a tied head that PEFT's own type stores."""
    head, own = tensors.get(base.head), tensors.get(base.embedding)
    if head is not None and own is not None:
        if not np.array_equal(head.read(), own.read()):
            raise ValueError(
                f"{head.key!r} and {own.key!r} differ, but the two are tied; load the "
                "base with tied=False and set its head/kernel to the transposed "
                "embedding"
            )
    twice = base.head if own is not None else None
    return {module: t for module, t in tensors.items() if module != twice}


def _made(key: str, rows: tuple[int, ...], delta: np.ndarray, base: Base) -> Rows:
    """The adapter of a leaf; `delta` is `[rows, width]`."""
    path, _, entry = base.where[key]
    axes, shape = factors.axes_of(entry, stacked=False), base.shapes[path].shape
    in_, out, _ = axes.sizes(shape)
    if path.endswith("/embedding"):
        value = jnp.asarray(delta.reshape(len(rows), *out))
        return Rows(axes, rows, in_[0], embedding=value)
    value = jnp.asarray(delta.T.reshape(*in_, len(rows)))
    return Rows(axes, rows, out[0], head=value)


class Written(NamedTuple):
    """What a file holds for trained rows.

    Attributes:
      tensors: by key.
      rows: the config's `trainable_token_indices`; empty if there are none.
    """

    tensors: dict[str, np.ndarray]
    rows: dict[str, list[int]]


def write(adapters: Mapping[str, Rows], base: Base, params: Any) -> Written:
    """Returns the tensors of row adapters, and the config's field.

    Args:
      adapters: by path.
      base: the model.
      params: leaves by path; None if they are not known.

    Raises:
      ValueError: there are no parameters, or torch has an embedding several times.
    """
    tensors, rows = {}, {}
    keys = {location.path: key for key, location in base.where.items()}
    for path, adapter in adapters.items():
        key = keys[path]
        module = key.removesuffix(WEIGHT)
        if module != base.embedding:
            base.require_one(module)
        if params is None:
            raise ValueError(
                f"{path}: PEFT stores the rows themselves, that is, the base's plus "
                "what the adapter adds; pass the base's parameters as params="
            )
        whole: Any = adapter.merge(jnp.asarray(params[path], jnp.float32))
        leaf = {path: np.asarray(jax.device_get(whole))}
        own = base.tensor(key, leaf)[list(adapter.rows)]
        tensors[PREFIX + module + END] = np.ascontiguousarray(own, np.float32)
        rows[module] = list(adapter.rows)
    return Written(tensors, rows)


def alone(
    written: Written, base: Base, given: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors and the config of PEFT's own type, which only trains rows.

    Args:
      written: the rows.
      base: the model; PEFT's file also has a tied head's rows.
      given: config fields that do not affect the function.

    Raises:
      ValueError: modules have different rows, while the type has one list; or other
        fields are given.
    """
    if odd := sorted(given.keys() - ALWAYS_HARMLESS):
        raise ValueError(f"fields={odd}: PEFT's {ROWS_TYPE} has no such fields")
    lists = list(written.rows.values())
    if any(rows != lists[0] for rows in lists):
        raise ValueError(
            f"PEFT's {ROWS_TYPE} has one list of tokens, but the adapters have "
            f"{written.rows}; give them the same rows, or adapt another kernel as well"
        )
    tensors = {module_of(key) + ALONE: rows for key, rows in written.tensors.items()}
    embedding, head = (PREFIX + m + ALONE for m in (base.embedding, base.head))
    if base.head and embedding in tensors:
        tensors[head] = tensors[embedding].copy()
    return tensors, {
        "peft_type": ROWS_TYPE,
        "target_modules": sorted(written.rows),
        "token_indices": lists[0],
        "init_weights": True,
        "inference_mode": True,
        "task_type": None,
        **given,
    }
