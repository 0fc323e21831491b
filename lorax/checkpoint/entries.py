"""Adapters without their values as JSON data, and back.

    {"class": "lora", "module": "lorax.adapters.lora",
     "static": {"scale": 2.0, "axes": {"Axes": {"in_": [0], ...}}, ...},
     "arrays": {"a": {"shape": [3, 1], "dtype": "float32"}, ...}}

describe(path, adapter)   the entry
skeleton(entry)           the adapter with abstract arrays; fields checked by `STATIC`
filled(...)               skeletons of older files, completed from a template
check_template(...)       compares skeletons with a template and names what differs
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import adapters as adapter_classes
from lorax import untrusted
from lorax.checkpoint import digests
from lorax.types import Adapters, Axes

RECORDS = {cls.__name__: cls for cls in (Axes,)}
"""Named tuples that static fields may contain, by name."""

NUMBERS = untrusted.listed(untrusted.whole())
FLOAT32_MAX = float(np.finfo(np.float32).max)

STATIC = {
    "scale": untrusted.number(-FLOAT32_MAX, FLOAT32_MAX),
    "dropout": untrusted.number(0, below=1),
    "axes": untrusted.Rule(
        "an Axes that lists each axis exactly once",
        lambda v: (
            isinstance(v, Axes)
            and all(NUMBERS.fits(part) for part in v)
            and sorted(v.order) == list(range(len(v.order)))
        ),
    ),
    "layers": untrusted.Rule(
        "layer numbers, each at most once, or null",
        lambda v: v is None or (NUMBERS.fits(v) and 0 < len(v) == len(set(v))),
    ),
    "slices": untrusted.Rule(
        "slice numbers in increasing order",
        lambda v: NUMBERS.fits(v) and len(v) > 0 and list(v) == sorted(set(v)),
    ),
    "rows": untrusted.Rule(
        "row numbers in increasing order",
        lambda v: NUMBERS.fits(v) and len(v) > 0 and list(v) == sorted(set(v)),
    ),
    "size": untrusted.whole(1),
    "blocks": untrusted.whole(1),
    "detach_norm": untrusted.FLAG,
    "lent": untrusted.Rule(
        "pairs (field, name of its array in Base.frozen), each field once",
        lambda v: (
            isinstance(v, tuple)
            and all(isinstance(p, tuple) and len(p) == 2 for p in v)
            and all(untrusted.TEXT.fits(text) and text for p in v for text in p)
            and len({p[0] for p in v}) == len(v)
        ),
    ),
    "moved_by": untrusted.Rule("a name", lambda v: untrusted.TEXT.fits(v) and v) | None,
}
"""What an adapter's static fields must be, by name; other fields are unrestricted."""


def fields(adapter: Any, static: bool) -> list[str]:
    """Returns the names of the static fields, or of the array fields."""
    return [f.name for f in dataclasses.fields(adapter) if _is_static(f) == static]


def arrays(adapter: Any) -> dict[str, Any]:
    """Returns the array fields that are not None, without those the base holds."""
    lent = {field for field, _ in getattr(adapter, "lent", ())}
    names = [name for name in fields(adapter, static=False) if name not in lent]
    values = {name: getattr(adapter, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def lent_names(adapters: Adapters) -> dict[str, str]:
    """Returns the names of all frozen arrays, each with a path that uses it."""
    return {
        name: path
        for path, adapter in reversed(adapters.items())
        for _, name in getattr(adapter, "lent", ())
    }


def describe(path: str, adapter: Any) -> dict[str, Any]:
    """Returns everything about an adapter except its values, as JSON data.

    Raises:
      TypeError: the class is not registered, or JSON cannot represent a field.
    """
    name = adapter_classes.name_of(type(adapter))
    if name is None:
        raise TypeError(
            f"{path}: {type(adapter).__name__} is not registered, so it could not be "
            "loaded again; call lorax.adapters.register(name, "
            f"{type(adapter).__name__}) where the class is defined"
        )
    static = {
        field: _encode(f"{path}: {field}", getattr(adapter, field))
        for field in fields(adapter, static=True)
    }
    shapes = {field: digests.kind(value) for field, value in arrays(adapter).items()}
    home = type(adapter).__module__
    return {"class": name, "module": home, "static": static, "arrays": shapes}


def _class_of(name: str, module: Any) -> Any:
    """The class that a file names; older files give the Python class name."""
    known = adapter_classes.REGISTRY
    older = {cls.__name__: cls for cls in known.values()}
    if name in known or name in older:
        return known.get(name) or older[name]
    where = f"import {module}" if isinstance(module, str) else "import its module"
    raise ValueError(
        f"class {name!r} is not registered; those registered are {sorted(known)}. "
        f"Before loading, {where}, which registers it (loading never imports modules "
        "that a file names)"
    )


def skeleton(entry: Any) -> Any:
    """Returns the adapter with abstract arrays.

    Args:
      entry: as `describe` returns it, or as read from a file.

    Raises:
      ValueError: a field is absent, unknown or out of range, or fields do not fit one
        another; the error names the field.
    """
    name = untrusted.field(entry, "class", untrusted.TEXT)
    cls = _class_of(name, entry.get("module"))
    static = untrusted.field(entry, "static", untrusted.TABLE)
    kinds = untrusted.field(entry, "arrays", untrusted.TABLE)
    for given, part in ((static, "static"), (kinds, "arrays")):
        _require_names(cls, given, part)
    values: dict[str, Any] = dict.fromkeys(fields(cls, static=False))
    values |= {field: abstract(f"arrays.{field}", k) for field, k in kinds.items()}
    for field, value in static.items():
        where = f"static.{field}"
        rule = STATIC.get(field, untrusted.ANY)
        values[field] = untrusted.check(where, _decode(where, value), rule)
    made = cls(**values)
    own = {n for n, field in cls.fields.items() if field.frozen}
    if odd := sorted({field for field, _ in getattr(made, "lent", ())} - own):
        raise ValueError(
            f"static.lent: {odd[0]!r} is not a frozen field of {cls.__name__}, which "
            f"has {sorted(own)}"
        )
    _require_layout(made)
    return made


def filled(skeletons: Adapters, told: dict[str, Any], template: Adapters) -> Adapters:
    """Returns skeletons whose missing static fields come from the template.

    Args:
      skeletons: made from `told`.
      told: the entries by path; older files lack some static fields.
      template: adapters with the expected static fields.
    """
    made: dict[str, Any] = dict(skeletons)
    for path, adapter in skeletons.items():
        like: Any = template.get(path)
        if type(like) is type(adapter):
            lacking = set(fields(adapter, static=True)) - set(told[path]["static"])
            values = {field: getattr(like, field) for field in lacking}
            made[path] = made[path].replace(**values)
    return made


def check_template(skeletons: Adapters, template: Adapters) -> None:
    """Raises ValueError naming the first path and field in which the two differ."""
    if differing := sorted(skeletons.keys() ^ template.keys()):
        where = "checkpoint" if differing[0] in skeletons else "template"
        raise ValueError(
            f"{differing[0]}: only the {where} has an adapter there ({len(differing)} "
            "paths differ)"
        )
    for path, adapter in skeletons.items():
        ours, theirs = describe(path, adapter), describe(path, template[path])
        if ours["class"] != theirs["class"]:
            raise ValueError(
                f"{path}: the checkpoint has class {ours['class']} and the template "
                f"{theirs['class']}"
            )
        for part in ("static", "arrays"):
            for field in ours[part] | theirs[part]:
                pair = ours[part].get(field), theirs[part].get(field)
                if pair[0] != pair[1]:
                    raise ValueError(
                        f"{path}: the checkpoint has {field}={pair[0]} and the "
                        f"template {field}={pair[1]}"
                    )


def _is_static(field: dataclasses.Field) -> bool:
    return not field.metadata.get("pytree_node", True)


def _encode(where: str, value: Any) -> Any:
    """A static field as JSON data; tuples become lists, named tuples {name: fields}."""
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple):
        if RECORDS.get(type(value).__name__) is type(value):
            items = value._asdict().items()
            return {type(value).__name__: {k: _encode(where, v) for k, v in items}}
        if type(value) is tuple:
            return [_encode(where, item) for item in value]
    raise TypeError(
        f"{where} is {value!r}; adapters.json holds None, bool, int, finite float, str "
        f"and tuples of these (including {', '.join(RECORDS)})"
    )


def _decode(where: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(where, item) for item in value)
    if isinstance(value, dict):
        name, items = next(iter(value.items()), ("", None))
        cls = RECORDS.get(name)
        if cls is None or len(value) > 1 or not isinstance(items, dict):
            raise ValueError(
                f"{where}={untrusted.shown(value)}; an object there must have the form "
                f"{{name: fields}}, where name is one of {', '.join(RECORDS)}"
            )
        if set(items) != set(cls._fields):
            raise ValueError(
                f"{where}.{name} has the fields {sorted(items)}; it needs "
                f"{list(cls._fields)}"
            )
        return cls(**{k: _decode(f"{where}.{name}.{k}", v) for k, v in items.items()})
    return value


def abstract(where: str, told: Any) -> jax.ShapeDtypeStruct:
    """Returns the abstract array that a file describes; ValueError if it is invalid."""
    shape = untrusted.field(told, "shape", untrusted.SHAPE, where)
    name = untrusted.field(told, "dtype", untrusted.TEXT, where)
    try:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(name))
    except TypeError as error:
        raise ValueError(f"{where}.dtype={name!r} is not a dtype") from error


def _require_names(cls: Any, given: dict[str, Any], part: str) -> None:
    """Checks the names of fields against those of the class."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    own = [n for n, f in known.items() if _is_static(f) == (part == "static")]
    for name in given:
        if name not in own:
            raise ValueError(
                f"{part}.{name}: {cls.__name__} has no such field; it has {own}"
            )
    for name in own:
        field = known[name]
        free = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in given and not free:
            raise ValueError(f"{part}: there is no {name!r} in it")


def _require_layout(made: Any) -> None:
    """Checks that factors, axes and layers, if present, fit one another.

    In a population's adapters every array has the population's axes in front.
    """
    axes, layers = getattr(made, "axes", None), getattr(made, "layers", None)
    pair = any(field.pair for field in made.fields.values())
    if not isinstance(axes, Axes):
        return
    if hasattr(made, "slices") and max(made.slices) >= made.blocks:
        raise ValueError(f"static.slices={made.slices} exceeds blocks={made.blocks}")
    if hasattr(made, "rows") and max(made.rows) >= made.size:
        raise ValueError(f"static.rows={untrusted.shown(made.rows)} of {made.size}")
    try:
        plain: Any = jax.eval_shape(adapter_classes.as_lora, made)
        if not pair and type(plain) is type(made):
            return  # not a product of factors, so their sizes do not give the leaf's
        before = plain.a.ndim - len(axes.in_) - 1
        members = before - len(axes.batch)
        batch, in_ = plain.a.shape[members:before], plain.a.shape[before:-1]
        out = plain.b.shape[before + 1 :]
        if layers is not None:
            batch = (max(layers) + 1, *batch[1:])
        leaf = dict(zip(axes.order, (*batch, *in_, *out), strict=True))
        shape = tuple(leaf[axis] for axis in range(len(leaf)))
        fronts = {x.shape[:members] for x in arrays(made).values()}
        if members < 0 or len(fronts) > 1:
            raise ValueError("the arrays do not have the same axes in front")
        one = {
            name: jax.ShapeDtypeStruct(x.shape[members:], x.dtype)
            for name, x in arrays(made).items()
        }
        whole = jax.ShapeDtypeStruct(shape, jnp.float32)
        dataclasses.replace(made, **one).check("arrays", whole)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"arrays and static.axes={axes}, layers={layers} do not fit one another: "
            f"{error}"
        ) from error
