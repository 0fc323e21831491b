"""PEFT's adapters: `adapter_config.json` and `adapter_model.safetensors`, both ways.

    adapters = peft.load("path/or/hub-id", model.config)
    peft.save("mine", adapters, model.config, base_name="meta-llama/Llama-3.2-1B")

LoRA, rsLoRA, DoRA and AdaLoRA on linear maps and embeddings, and modules stored whole.
What is written computes in PEFT what it computes here, and back. A tied embedding and
head are one leaf here, so an adapter on it is written for both; PEFT's adapters of only
one of them need a model with `tied=False`. (Never merge an adapter of tied weights in
PEFT: `merge_and_unload` adds both halves to the one weight.)

References:
  Mangrulkar et al., PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods,
  https://github.com/huggingface/peft.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from lorax import adapters as adapter_classes
from lorax import compose, tree
from lorax.adapters import Lora, as_lora
from lorax.interop import (
    assembly,
    factors,
    files,
    hf,
    peft_config,
    peft_tensors,
    peft_written,
)
from lorax.interop.factors import Module
from lorax.interop.peft_base import WEIGHT, Base
from lorax.types import Adapters, PyTree

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def load(
    source: str | pathlib.Path,
    config: Any,
    params: PyTree = None,
    *,
    residual: bool = False,
    revision: str | None = None,
) -> Adapters:
    """Reads an adapter of PEFT.

    Every name and shape is checked against the config and the base before a weight is
    read. In a stack of layers, unequal ranks are padded with zeros and unequal scales
    folded into b (AdaLoRA: lam).

    Args:
      source: a directory, or the id of an adapter on the hub.
      config: of the base, `model.config`.
      params: of the base; only frozen embeddings that PEFT stored along are held
        against it. None: against nothing.
      residual: the base is the one that PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ left, not
        the original.
      revision: of the hub's repository.

    Returns:
      `{path: Lora | Dora | AdaLora | Full}`, in float32.

    Raises:
      FileNotFoundError: no such files.
      ValueError: a file that is not sound or not for this base, or a field of its
        config that is not implemented; file and key are named.
    """
    directory = hf.locate(source, revision)
    if not (directory / TENSORS).exists():
        raise FileNotFoundError(_nothing(directory))
    settings = _settings(directory, residual)
    path = files.inside(directory, TENSORS)
    tensors = files.open_tensors(path)
    base = Base(config)
    leaves = {} if params is None else tree.flatten(params)
    try:
        modules, saved = peft_tensors.read(tensors, settings, base, leaves)
        modules, saved = _untied(modules, saved, base)
        found = assembly.adapters(modules, saved, base, settings.dropout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not settings.moved:
        return found
    by = f"PEFT's {settings.moved}(rank={settings.rank})"
    mark: Any = lambda _, a: a if a.replaces else dataclasses.replace(a, moved_by=by)
    return tree.map_adapters(mark, found)


def save(
    directory: str | pathlib.Path,
    adapters: Adapters,
    config: Any,
    *,
    base_name: str | None = None,
    initial: Adapters | None = None,
    residual: bool = False,
    rank_stabilized: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Writes adapters for PEFT's `PeftModel.from_pretrained` and for `load`.

    Triplets that are zero in every factor are padding and are left out; of AdaLoRA that
    is the pruned form, after `lorax.optim.adalora_shrink`.

    Args:
      directory: made if need be; files of the same names are replaced.
      adapters: `{path: adapter}`, of one parametrisation beside Full.
      config: of the base, `model.config`.
      base_name: of the base, for `base_model_name_or_path`.
      initial: what `lorax.init` returned, if it moved a part of the base's kernels
        (PiSSA, MiLoRA, LoRA-GA, OLoRA, CorDA): what is written is then for the original
        base, at twice the rank.
      residual: True, without `initial`: write such adapters as they are, for the base
        that their init left.
      rank_stabilized: write alpha for rsLoRA's alpha / sqrt(rank); the function is the
        same.
      fields: of the config, that say nothing of the function (`task_type`,
        `total_step`, ...), and `lora_dropout`.

    Raises:
      KeyError: a path that the model lacks.
      ValueError: adapters that do not fit it, or that PEFT has no form for; ones whose
        init moved the base, without `initial` or `residual`.
    """
    base = Base(config)
    tree.require(adapters, base.shapes, "model")
    for path, adapter in adapters.items():
        adapter.check(path, base.shapes[path])
    if initial is not None:
        adapters = _on_original(adapters, initial)
    elif not residual:
        _refuse_moved(adapters)
    adapters = {  # PEFT has one adapter a module
        path: as_lora(a) if "slices" in vars(a) else a for path, a in adapters.items()
    }
    kind = _kind(adapters)
    modules, saved = _split(adapters, base)
    if kind == "adalora":
        modules = factors.one_scale(modules)
    tensors = {f"{peft_config.PREFIX}{key}": t for key, t in saved.items()}
    for module in modules:
        embedding = base.is_embedding(module.name)
        if embedding and kind == "adalora":
            raise ValueError(
                f"{module.name!r} is an embedding, on which PEFT has no AdaLoRA; "
                "compose.to_lora writes it as plain LoRA"
            )
        tensors |= peft_tensors.to_disk(module, kind, embedding)
    if odd := [key for key, tensor in tensors.items() if not files.is_finite(tensor)]:
        raise ValueError(f"{odd[0]!r} would hold NaN or infinity")
    rates = {
        getattr(adapter, "dropout", 0.0)
        for path, adapter in adapters.items()
        if not adapter.replaces and not path.endswith("/embedding")
    }
    written = peft_written.fields(
        kind, modules, list(saved), base, rates, rank_stabilized, dict(fields or {})
    )
    written["base_model_name_or_path"] = base_name
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)  # never beside another's tensors
    safetensors.numpy.save_file(tensors, directory / TENSORS, {"format": "pt"})
    text = json.dumps(written, indent=2, sort_keys=True, allow_nan=False)
    (directory / CONFIG).write_text(text + "\n")


def _settings(directory: pathlib.Path, residual: bool) -> peft_config.Settings:
    path = files.inside(directory, CONFIG)
    raw = files.read_json(path)
    try:
        settings = peft_config.read(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if settings.moved and not residual:
        raise ValueError(
            f"{path}: init_lora_weights={settings.moved!r} took a part out of the "
            "base's kernels, so on the original base this adapter is wrong; convert it "
            "in PEFT with model.save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or load the residual base "
            "and pass residual=True"
        )
    return settings


def _nothing(directory: pathlib.Path) -> str:
    told = f"{directory} has no {TENSORS}"
    if pickles := sorted(p.name for p in directory.glob("adapter_model.*")):
        told += (
            f"; {pickles[0]} is a pickle, which can run code and is never read: load "
            "it in PEFT and call save_pretrained, which writes safetensors"
        )
    return told


def _untied(
    modules: list[Module], saved: dict[str, np.ndarray], base: Base
) -> tuple[list[Module], dict[str, np.ndarray]]:
    """Drops what a tied head repeats of its embedding; ValueError where they differ."""
    if not base.head:
        return modules, saved
    pair = {m.name: m for m in modules if m.name in (base.embedding, base.head)}
    whole = [n + WEIGHT for n in (base.embedding, base.head) if n + WEIGHT in saved]
    wrong = (
        "PEFT adapts the embedding and its tied head apart, and here they are one "
        "leaf; load the base with tied=False, its head/kernel the embedding transposed"
    )
    if pair:
        if len(pair) < 2 or any(m.magnitude is not None for m in pair.values()):
            raise ValueError(f"factors for {next(iter(pair))!r}: {wrong}")
        one, two = pair[base.head], factors.mirrored(pair[base.embedding], base.head)
        same = np.array_equal(one.a, two.a) and np.array_equal(one.b, two.b)
        if not same or one.scale != two.scale:
            raise ValueError(f"factors for {base.head!r}: {wrong}")
    if whole:
        if len(whole) < 2 or not np.array_equal(saved[whole[0]], saved[whole[1]]):
            raise ValueError(f"the whole of {whole[0]!r}: {wrong}")
        del saved[base.head + WEIGHT]
    return [m for m in modules if m.name != base.head], saved


KINDS = ("lora", "dora", "adalora")
"""Parametrisations that are written, by their registered names."""


def _kind(adapters: Adapters) -> str:
    kinds = {type(a): path for path, a in adapters.items() if not a.replaces}
    if len(kinds) > 1:
        raise ValueError(
            "one adapter of PEFT has one parametrisation, and these have several: "
            + ", ".join(f"{c.__name__} at {path!r}" for c, path in kinds.items())
            + "; save them apart, or write AdaLora as Lora by compose.to_lora"
        )
    if not kinds:
        raise ValueError("no low-rank adapters: PEFT has no form for Full alone")
    cls, path = next(iter(kinds.items()))
    name = adapter_classes.name_of(cls)
    if name not in KINDS:
        raise ValueError(
            f"{path}: PEFT's files have no form for {cls.__name__}; merge it "
            "(lorax.merge) and save the model, or read it back as Lora "
            "(compose.extract)"
        )
    return name


def _split(
    adapters: Adapters, base: Base
) -> tuple[list[Module], dict[str, np.ndarray]]:
    """The modules and whole tensors that the adapters are on disk."""
    keys: dict[str, list[str]] = {}
    for key, location in base.where.items():
        keys.setdefault(location.path, []).append(key)
    modules, saved = [], {}
    for path, adapter in sorted(adapters.items()):
        base.require_one(keys[path][0].removesuffix(WEIGHT))
        if adapter.replaces:
            (value,) = jax.tree.leaves(adapter)
            leaves = {path: np.asarray(jax.device_get(value))}
            for key in keys[path]:
                saved[key] = base.tensor(key, leaves)
            continue
        lora: Any = adapter
        entry, stacked = base.where[keys[path][0]].entry, len(lora.axes.batch) > 0
        want = factors.axes_of(entry, stacked)
        if lora.axes != want or not entry.inputs:
            raise ValueError(
                f"{path}: PEFT's factors have {want} of this leaf, and the adapter "
                f"has {lora.axes}"
            )
        chosen = range(len(keys[path])) if lora.layers is None else lora.layers
        names = [keys[path][layer].removesuffix(WEIGHT) for layer in chosen]
        modules += factors.split(lora, names)
    _check_whole(saved, base)
    return _with_head(modules, saved, base)


def _check_whole(saved: Collection[str], base: Base) -> None:
    """PEFT stores a module whole or adapts it, and cannot load a part of one."""
    whole = {key.rpartition(".")[0] for key in saved}
    for key in base.where:
        parts = [key[:i] for i, letter in enumerate(key) if letter == "."]
        if key not in saved and (module := whole.intersection(parts)):
            raise ValueError(
                f"a part of {min(module)!r} is Full, and PEFT stores modules whole: "
                f"make {base.where[key].path!r} Full too, not another adapter"
            )


def _with_head(
    modules: list[Module], saved: dict[str, np.ndarray], base: Base
) -> tuple[list[Module], dict[str, np.ndarray]]:
    """Repeats for a tied head what its embedding has."""
    embedding = base.embedding + WEIGHT
    if base.head and embedding in saved:
        saved[base.head + WEIGHT] = saved[embedding].copy()
    for module in [m for m in modules if base.head and m.name == base.embedding]:
        if module.magnitude is not None:
            raise ValueError(
                f"{module.name!r} is embedding and head in one, whose outputs differ: "
                "PEFT has no DoRA for both"
            )
        modules.append(factors.mirrored(module, base.head))
    return modules, saved


def _on_original(adapters: Adapters, initial: Adapters) -> Adapters:
    """`compose.to_lora`, and DoRA by the same sum: its norm is of all the kernel."""
    rescaled = lambda a: "magnitude" in a.roles
    plain = lambda a: (
        Lora(a.a, a.b, a.scale, a.axes, a.dropout, a.layers, a.moved_by)
        if rescaled(a)
        else a
    )
    found = compose.to_lora(
        {path: plain(a) for path, a in adapters.items()},
        {path: plain(a) for path, a in initial.items()},
    )
    for path, adapter in adapters.items():
        if rescaled(adapter):
            lora: Any = found[path]
            own: Any = adapter
            found[path] = dataclasses.replace(
                own, a=lora.a, b=lora.b, scale=lora.scale, moved_by=lora.moved_by
            )
    return found


def _refuse_moved(adapters: Adapters) -> None:
    for path, adapter in adapters.items():
        if moved_by := getattr(adapter, "moved_by", None):
            raise ValueError(
                f"{path}: {moved_by} moved a part of the base's kernel into this "
                "adapter, so on the original base it is wrong; pass initial=, what "
                "lorax.init returned, or residual=True to write it for the moved base"
            )
