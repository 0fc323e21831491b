"""Loads Hugging Face checkpoints directly into a sharded Flax tree, and saves them.

    model, params = hf.load("path/or/hub-id")
    logits = model.apply({"params": params}, tokens)
    hf.save("merged", model.config, lorax.merge(adapters, params))

Only `config.json` and safetensors are read, and no code in a checkpoint is run.
Everything that headers show is checked before the first weight is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lorax import models, tree, untrusted
from lorax.interop import (
    bitsandbytes,
    files,
    leaves,
    multimodal,
    mxfp4,
    packed,
    sources,
)
from lorax.interop.vocabulary import resize_embeddings as resize_embeddings
from lorax.models import table
from lorax.quantization import Rules
from lorax.types import PyTree

OLD_NAMES = ((r"(.*)\.gamma$", r"\1.weight"), (r"(.*)\.beta$", r"\1.bias"))
HUB_FILES = sources.HUB_FILES
locate, find_local = sources.locate, sources.find_local


def load(
    source: str | pathlib.Path,
    *,
    shardings: PyTree | Callable[[nn.Module, PyTree], PyTree] | None = None,
    quantize: Rules | None = None,
    key: jax.Array | None = None,
    revision: str | None = None,
    dtype: Any = None,
    **switches: Any,
) -> tuple[nn.Module, PyTree]:
    """Loads a model; from a multimodal checkpoint, the text model (see `multimodal`).

    Args:
      source: a directory with `config.json` and safetensors; or, if there is no such
        directory, the id of a model on the hub, which is then downloaded.
      shardings: a tree of `jax.sharding.Sharding` like the parameters, or a function
        that returns it, given the model and its abstract parameters. Every process
        reads only its own slices, except of quantised leaves, whose layers it reads in
        full. A quantised leaf has its kernel's sharding, or one for each array. None:
        the default device.
      quantize: rules as for `lorax.quantize`, such as "nf4": the leaves they select are
        quantised while loading, one layer at a time, with the same result as
        `lorax.quantize`. None: quantise nothing.
      key: initialises a head that the checkpoint lacks, for example to make an encoder
        a classifier; None: a missing head is an error.
      revision: a revision of the hub repository.
      dtype: of the computation; None for the checkpoint's own. The parameters keep
        theirs.
      **switches: fields of the family's `Config` that config.json does not have, such
        as `scan`, `remat`, `dropout`, `head`.

    Returns:
      The Flax module, with its `config`, and its parameters.

    Raises:
      FileNotFoundError: the files do not exist.
      ValueError: a file is damaged; an architecture or a field is not implemented;
        tensors are missing, left over, misshapen or not finite; or `lorax.quantize`
        would refuse the rules.
    """
    directory = locate(source, revision)
    whole = files.read_json(files.inside(directory, "config.json"))
    raw = multimodal.text_config(whole, directory)
    family = family_of(raw, directory)
    try:
        text = multimodal.text_tensors(files.open_checkpoint(directory), whole)
        tensors: Mapping[str, Any] | None = mxfp4.gathered(text, raw)
        if tensors is None:
            tensors = bitsandbytes.gathered(text, raw)
        stored = _dtype(tensors.values())
        dtype = stored if dtype is None else dtype
        model = configured(raw, directory, dtype=dtype, param_dtype=stored, **switches)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    config = model.config
    shapes = abstract(model)
    try:
        found = _placed(family, config, tensors, shapes, draws_heads=key is not None)
        plans: dict[str, Any] = {
            **bitsandbytes.plans(found, _flat(shapes)),
            **mxfp4.plans(found, _flat(shapes)),
        }
    except ValueError as error:
        raise ValueError(f"{directory}: {error}; {_sizes(raw, config)}") from error
    if quantize is not None:
        plans |= packed.plans(
            packed.chosen(model, shapes, quantize, example(model)), found, plans
        )
    if callable(shardings):
        packs = {path: plan.abstract for path, plan in plans.items()}
        shardings = shardings(model, tree.replace(shapes, packs))
    flat = {} if shardings is None else _flat(shardings)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: dict[str, Any] = {}
    for path, shape in _flat(shapes).items():
        where = flat.get(path, default)
        if path in plans:
            params[path] = plans[path].read(where)
        elif path in found:
            params[path] = leaves.read(found[path], shape.shape, where)
    absent = [path for path in _flat(shapes) if path not in params]
    if absent:
        params |= _drawn(model, key, absent, flat)
    return model, flax.traverse_util.unflatten_dict(params, sep="/")


def save(
    directory: str | pathlib.Path,
    config: Any,
    params: PyTree,
    *,
    file_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model so that transformers and `load` read it, bit for bit.

    Args:
      directory: created if necessary; files of the same names are replaced.
      config: the family's config, `model.config`.
      params: the model's parameters, such as those that `lorax.merge` returns.
      file_bytes: a new file is started before one would exceed this size.

    Raises:
      ValueError: the tree is not the model's.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = getattr(family_of(config.to_hf(), "config"), "WRITTEN", ())
    tensors = {table.renamed(k, written): t for k, t in to_disk(config, params).items()}
    kinds = {str(tensor.dtype) for tensor in tensors.values()}
    written = dict(config.to_hf())
    if len(kinds) == 1:
        written |= dict.fromkeys(("dtype", "torch_dtype"), kinds.pop())
    for stale in directory.glob("model*.safetensors*"):
        stale.unlink()
    _write(directory, tensors, file_bytes)
    (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def configured(config: Mapping[str, Any], directory: Any, **switches: Any) -> nn.Module:
    """Returns the Flax module that the fields of a config.json describe.

    Args:
      config: the fields; for a multimodal model, those of its text model are used.
      directory: where they are from, for errors.
      **switches: as for `load`, and the dtypes, which `load` takes from the tensors.

    Raises:
      ValueError: an architecture, a field or a switch is not implemented.
    """
    raw = multimodal.text_config(config, directory)
    family = family_of(raw, directory)
    fields = {name: raw[name] for name in raw if name != "quantization_config"}
    known = [field.name for field in dataclasses.fields(family.Config)]
    if unknown := sorted(set(switches) - set(known)):
        raise ValueError(
            f"{directory}: {family.__name__}.Config has no field {unknown[0]!r}; its "
            f"fields are {', '.join(known)}"
        )
    return family.Model(family.Config.from_hf(fields, **switches))


def family_of(config: Mapping[str, Any], directory: Any) -> ModuleType:
    """Returns the module of `lorax.models` that implements a config.json."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in models.FAMILIES:
        raise ValueError(
            f"{directory}: config.json: model_type={untrusted.shown(kind)} is not "
            "implemented; supported are "
            f"{', '.join(sorted(models.FAMILIES))}"
        )
    return models.FAMILIES[kind]


@functools.lru_cache(8)
def abstract(model: Any) -> PyTree:
    """Returns the shapes and dtypes of a model's parameters, traced only once."""
    return jax.eval_shape(model.init, jax.random.key(0), *example(model))["params"]


def to_disk(config: Any, params: PyTree) -> dict[str, np.ndarray]:
    """Returns `{key: tensor}` in the form of a checkpoint."""
    family = family_of(config.to_hf(), "config")
    flat = _flat(params)
    found = table.locate(family.entries(config), config.stacks, config.scan)
    paths = {location.path for location in found.values()}
    if paths != set(flat):
        odd = ", ".join(sorted(paths ^ set(flat))[:5])
        raise ValueError(f"these are not the parameters of the model: {odd}")
    if small := [path for path, leaf in flat.items() if tree.is_quantized(leaf)]:
        raise ValueError(
            f"{small[0]}: the leaf is quantised, but files hold dense leaves; save "
            "lorax.merge({}, params), or with adapters lorax.merge(adapters, params)"
        )
    tensors = {}
    for key, place in found.items():
        part = np.asarray(flat[place.path][place.part])
        tensors[key] = np.ascontiguousarray(table.to_disk(part, place.entry))
    return tensors


def example(model: Any) -> tuple[jax.Array, ...]:
    """Returns the smallest inputs: tokens, twice for two stacks; or an image."""
    family = family_of(model.config.to_hf(), "config")
    if hasattr(family, "example"):
        return family.example(model.config)
    return (jnp.zeros((1, 1), jnp.int32),) * getattr(family, "INPUTS", 1)


def _flat(tree: PyTree) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def _dtype(tensors: Any) -> Any:
    """The floating dtype that accounts for most bytes."""
    count: dict[Any, int] = {}
    for tensor in tensors:
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.nbytes
    return max(count, key=lambda dtype: count[dtype], default=np.dtype(np.float32))


def renamed(family: ModuleType, key: str) -> str:
    """Returns the current name of a tensor."""
    return table.renamed(key, (*OLD_NAMES, *family.ALIASES))


def _placed(
    family: ModuleType,
    config: Any,
    tensors: Mapping[str, files.Tensor | bitsandbytes.Coded],
    shapes: PyTree,
    *,
    draws_heads: bool,
) -> dict[str, list[tuple[Any, table.Location]]]:
    """Returns the tensors of every leaf, and which parts of it they are."""
    known: dict[str, files.Tensor | bitsandbytes.Coded] = {}
    for key, tensor in tensors.items():
        name = renamed(family, key)
        if name in known:
            raise ValueError(f"{key!r} and {known[name].key!r} are the same tensor")
        known[name] = tensor
    tables = [of(config) for of in (family.entries, *getattr(family, "FURTHER", ()))]
    where = table.nearest(tables, config.stacks, config.scan, known)
    ignored = (*family.IGNORED, *getattr(config, "unread", ()))
    for name in known.keys() - where.keys():
        if files.matches(ignored, name):
            del known[name]
    heads = getattr(family, "HEADS", ())
    optional = {
        k for k, v in where.items() if draws_heads and files.matches(heads, v.path)
    }
    tied = {"lm_head.weight"} if getattr(config, "tied", False) else set()
    missing = sorted(set(where) - set(known) - optional)
    extra = sorted(set(known) - set(where) - tied)
    if missing or extra:
        raise ValueError(
            "the tensors do not match its config.json; "
            f"missing: {untrusted.some(missing)}; left over: {untrusted.some(extra)}"
        )
    flat = _flat(shapes)
    found: dict[str, list[tuple[Any, table.Location]]] = {}
    for key, place in where.items():
        if key not in known:
            continue
        need = table.disk_shape(place.own(flat[place.path].shape), place.entry)
        if bitsandbytes.is_coded(known[key]) and not place.entry.transposed:
            need = need[::-1]
        if known[key].shape != need:
            raise ValueError(
                f"{known[key].path.name}: {key!r} has shape {list(known[key].shape)}, "
                f"but config.json requires {list(need)}"
            )
        found.setdefault(place.path, []).append((known[key], place))
    return found


def _sizes(raw: Mapping[str, Any], config: Any) -> str:
    """The sizes that a config.json gives, for errors about tensors with others."""
    told = []
    for name, value in config.to_hf().items():
        if isinstance(value, dict):
            told.append(f"{name} of {len(value)}")
        elif isinstance(value, int):
            absent = " (absent, so the default)" if raw.get(name) is None else ""
            told.append(f"{name}={value}{absent}")
    return f"config.json has {', '.join(told)}"


def _drawn(
    model: Any, key: jax.Array | None, absent: list[str], shardings: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Initialises the leaves that the checkpoint lacks; XLA drops the others."""

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        whole = _flat(model.init(key, *example(model))["params"])
        return {path: whole[path] for path in absent}

    out = {path: shardings[path] for path in absent} if shardings else None
    return jax.jit(draw, out_shardings=out)(key)


def _write(
    directory: pathlib.Path, tensors: Mapping[str, np.ndarray], file_bytes: int
) -> None:
    """Writes one file, or several and their index."""
    groups: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > file_bytes:
            groups.append({})
            size = 0
        groups[-1][key] = tensor
        size += tensor.nbytes
    metadata = {"format": "pt"}  # transformers refuses files without it
    if len(groups) == 1:
        safetensors.numpy.save_file(
            groups[0], directory / "model.safetensors", metadata
        )
        return
    where: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        safetensors.numpy.save_file(group, directory / name, metadata)
        where |= dict.fromkeys(group, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
