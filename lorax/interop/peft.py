"""Reads and writes PEFT's `adapter_config.json` and `adapter_model.safetensors`.

    adapters = peft.load("path/or/hub-id", model.config)
    peft.save("mine", adapters, model.config, base_name="meta-llama/Llama-3.2-1B")

Supported are LoRA, rsLoRA, DoRA and AdaLoRA on linear maps and embeddings, the types of
`peft_table` on the linear maps for which PEFT has them, and modules saved in full. An
adapter computes the same function here and in PEFT. A tied embedding and head are one
leaf here, so an adapter on it is written for both; to load PEFT's adapter of only one
of them, use a model with `tied=False`. (Never merge an adapter of tied weights in PEFT:
`merge_and_unload` adds both halves to the one weight.)

References:
  Mangrulkar et al., PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods,
  https://github.com/huggingface/peft.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lorax import tree
from lorax.adapters import as_lora
from lorax.interop import (
    assembly,
    factors,
    files,
    hf,
    peft_base,
    peft_biases,
    peft_config,
    peft_forms,
    peft_layers,
    peft_leaves,
    peft_moved,
    peft_parameters,
    peft_rows,
    peft_table,
    peft_tensors,
    peft_written,
)
from lorax.interop.factors import Module
from lorax.interop.peft_layers import replicate_layers as replicate_layers
from lorax.interop.peft_selection import PREFIX
from lorax.types import Adapters, Base, PyTree

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def load(
    source: str | pathlib.Path,
    config: Any,
    params: PyTree = None,
    *,
    residual: bool = False,
    revision: str | None = None,
) -> Adapters:
    """Loads a PEFT adapter.

    Every name and shape is checked against the config and the base before any weight is
    read. In a stack of layers, unequal ranks are padded with zeros, and unequal scales
    are folded into b (AdaLoRA: lam).

    Args:
      source: a directory, or the id of an adapter on the hub.
      config: the base's config, `model.config`.
      params: the base's parameters. Frozen embeddings in the file are compared with
        them; None skips that. Adapters of single rows or with `lora_bias` need them.
      residual: True if the base is the one that PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ
        left, not the original.
      revision: a revision of the hub repository.

    Returns:
      `{path: adapter}`, in float32.

    Raises:
      FileNotFoundError: the files do not exist.
      ValueError: a file is damaged or does not belong to this base, or a field of its
        config is not implemented (the message names file and key); or the adapter has
        frozen arrays (VeRA's projections), see `load_with_base`.
    """
    adapters, frozen = _load(source, config, params, residual, revision)
    if frozen:
        raise ValueError(
            f"{source}: {', '.join(sorted(frozen))} are frozen and belong to params, "
            "not to the adapters; call peft.load_with_base(source, config, params), "
            "which returns (adapters, params) with them"
        )
    return adapters


def load_with_base(
    source: str | pathlib.Path,
    config: Any,
    params: PyTree,
    *,
    residual: bool = False,
    revision: str | None = None,
) -> tuple[Adapters, PyTree]:
    """Loads a PEFT adapter together with its frozen arrays, such as VeRA's projections.

    Args:
      source: a directory, or the id of an adapter on the hub.
      config: the base's config, `model.config`.
      params: the base's parameters.
      residual: as in `load`.
      revision: a revision of the hub repository.

    Returns:
      The adapters, and params; like `lorax.init`, a `lorax.Base` if there are frozen
      arrays.

    Raises:
      FileNotFoundError: the files do not exist.
      ValueError: as in `load`; or `params.frozen` has a different array of that name.
    """
    adapters, found = _load(source, config, params, residual, revision)
    plain, held = tree.split(params)
    for name, array in found.items():
        if name in held and not np.array_equal(held[name], array):
            raise ValueError(
                f"{source}: params have a different frozen array {name!r}; pass the "
                "plain parameters, and keep the two sets of adapters apart"
            )
    frozen = {**held, **{name: jnp.asarray(array) for name, array in found.items()}}
    return adapters, Base(plain, frozen) if frozen else plain


def _load(
    source: str | pathlib.Path,
    config: Any,
    params: PyTree,
    residual: bool,
    revision: str | None,
) -> tuple[Adapters, dict[str, np.ndarray]]:
    """The adapters of a file, and its frozen arrays."""
    directory = hf.locate(source, revision)
    if not (directory / TENSORS).exists():
        raise FileNotFoundError(_nothing(directory))
    settings = _settings(directory, residual)
    path = files.inside(directory, TENSORS)
    tensors = files.open_tensors(path)
    base = peft_base.Base(config)
    leaves = {} if params is None else tree.flatten(params)
    try:
        peft_layers.require(settings.replicated, config, leaves)
        held = peft_tensors.read(tensors, settings, base, leaves)
        modules, saved = peft_leaves.untied(held.modules, held.saved, base)
        found = assembly.adapters(modules, saved, base, settings.dropout) | held.made
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not settings.moved:
        return found, held.frozen
    by = f"PEFT's {settings.moved}(rank={settings.rank})"

    def mark(path: str, adapter: Any) -> Any:
        return adapter.replace(moved_by=by) if hasattr(adapter, "moved_by") else adapter

    return tree.map_adapters(mark, found), held.frozen


def save(
    directory: str | pathlib.Path,
    adapters: Adapters,
    config: Any,
    *,
    params: PyTree = None,
    base_name: str | None = None,
    initial: Adapters | None = None,
    residual: bool = False,
    rank_stabilized: bool = False,
    uniform: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Writes adapters for PEFT's `PeftModel.from_pretrained` and for `load`.

    Ranks that are zero in every factor are padding and are left out; for AdaLoRA that
    gives the pruned form, after `lorax.optim.adalora_shrink`.

    Args:
      directory: created if necessary; files of the same names are replaced.
      adapters: `{path: adapter}`, all of one parametrisation, except Full.
      config: the base's config, `model.config`.
      params: the base's parameters, as from `lorax.init`; needed by methods that PEFT
        stores with frozen arrays (VeRA, RandLoRA), norms of the kernels (DeLoRA) or
        rows of the embedding (Rows).
      base_name: the base's name, for `base_model_name_or_path`.
      initial: what `lorax.init` returned, if it changed the base's kernels (PiSSA,
        MiLoRA, LoRA-GA, OLoRA, CorDA): the adapters are then written for the original
        base, at twice the rank.
      residual: True, without `initial`: write such adapters as they are, for the base
        that their init left.
      rank_stabilized: write alpha for rsLoRA's scale alpha / sqrt(rank); the function
        is the same.
      uniform: write one rank and one alpha for all modules: smaller ranks are padded
        with zeros, and ratios of scales go into B. For engines that do not read
        patterns (vLLM, SGLang; see `lorax.interop.engines`). The function is the same.
      fields: config fields that do not affect the function (`task_type`, `total_step`,
        ...), `lora_dropout`, and, for a base made by `replicate_layers`,
        `layer_replication`.

    Raises:
      KeyError: the model lacks a path.
      ValueError: adapters that do not fit the model, for which PEFT has no form, or
        whose init changed the base, without `initial` or `residual`.
    """
    base = peft_base.Base(config)
    tree.require(adapters, base.shapes, "model")
    for path, adapter in adapters.items():
        adapter.check(path, base.shapes[path])
    rows: dict[str, Any] = {p: a for p, a in adapters.items() if a.by_rows}
    adapters = {path: a for path, a in adapters.items() if path not in rows}
    given, leaves = dict(fields or {}), _leaves(params)
    peft_layers.require(given.get("layer_replication") or (), config, leaves or {})
    if initial is not None:
        adapters = peft_moved.on_original(adapters, initial)
    elif not residual:
        peft_moved.refuse(adapters)
    adapters = {  # PEFT has one adapter per module
        path: as_lora(a) if "slices" in vars(a) else a for path, a in adapters.items()
    }
    told = peft_rows.write(rows, base, leaves)
    if rows and not adapters and not uniform:
        tensors, written = peft_rows.alone(told, base, given)
    else:
        form = _Form(base, params, rank_stabilized, uniform, given)
        tensors, written = _with_factors(adapters, told, form)
    if odd := [key for key, tensor in tensors.items() if not files.is_finite(tensor)]:
        raise ValueError(f"{odd[0]!r} would hold NaN or infinity")
    written["base_model_name_or_path"] = base_name
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).unlink(missing_ok=True)  # never next to another's tensors
    safetensors.numpy.save_file(tensors, directory / TENSORS, {"format": "pt"})
    text = json.dumps(written, indent=2, sort_keys=True, allow_nan=False)
    (directory / CONFIG).write_text(text + "\n")


class _Form(NamedTuple):
    """The arguments of `save` that say how to write."""

    base: peft_base.Base
    params: PyTree
    rank_stabilized: bool
    uniform: bool
    given: dict[str, Any]


def _with_factors(
    adapters: Adapters, rows: peft_rows.Written, form: _Form
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the config of adapters with factors and all that goes along."""
    base = form.base
    kind = peft_leaves.kind_of(adapters)
    adapters, experts = _experts(adapters, kind, base)
    modules, saved = peft_leaves.split(adapters, base)
    if kind == "adalora":
        modules = factors.one_scale(modules)
    if form.uniform:
        modules = _uniform(modules, kind, experts)
    adapted = {module.name for module in modules}
    alone = peft_biases.lone(saved, base)
    tensors = {
        peft_biases.on_disk(key, adapted) if key in alone else PREFIX + key: tensor
        for key, tensor in saved.items()
    }
    stacks = peft_parameters.write(experts, base)
    tensors |= _to_disk(modules, kind, base, form.params)
    written = peft_written.fields(
        kind,
        modules,
        saved=[key for key in saved if key not in alone],
        bias=peft_biases.mode(alone, saved, adapted, base),
        tokens=rows.rows,
        parameters=stacks.modules,
        base=base,
        rates=_rates(adapters),
        rank_stabilized=form.rank_stabilized,
        given=form.given,
    )
    return tensors | rows.tensors | stacks.tensors, written


def _to_disk(
    modules: Sequence[Module], kind: str, base: peft_base.Base, params: PyTree
) -> dict[str, np.ndarray]:
    """Returns `{key: tensor}` of the modules, and of the tensors that they share."""
    _, frozen = tree.split(params)
    leaves = _leaves(params) or {}
    tensors: dict[str, np.ndarray] = {}
    places = [peft_tensors.place_of(m.name, {}, base, leaves) for m in modules]
    for module, place in zip(modules, places, strict=True):
        if form := peft_table.FORMS.get(kind):
            peft_forms.require_module(form, module.name, base)
        elif place.embedding and kind == "adalora":
            raise ValueError(
                f"{module.name!r} is an embedding, for which PEFT has no AdaLoRA; "
                "convert it to plain LoRA with compose.to_lora"
            )
        tensors |= peft_tensors.to_disk(module, kind, place)
    return tensors | peft_tensors.common_to_disk(modules, places, kind, frozen)


def _uniform(
    modules: list[Module], kind: str, experts: Mapping[str, Any]
) -> list[Module]:
    """Returns the modules with one rank and one scale."""
    if kind not in ("lora", "dora") or experts:
        what = f"{min(experts)}, experts," if experts else f"{kind}"
        raise ValueError(
            f"uniform=True works for Lora and Dora modules, not for {what}; "
            "choose one rank and one alpha in the Targets"
        )
    return factors.alike(modules) if modules else modules


def _experts(
    adapters: Adapters, kind: str, base: peft_base.Base
) -> tuple[Adapters, dict[str, Any]]:
    """Returns the adapters of modules, and those of experts' kernels."""
    paths = {place.path for place in base.parameters.values()}
    own = {p: a for p, a in adapters.items() if p in paths and not a.replaces}
    if own and kind != "lora":
        raise ValueError(
            f"{min(own)}: PEFT adapts experts only with plain Lora "
            f"(target_parameters), and this is {kind}; merge it (lorax.merge) and save "
            "the model"
        )
    return {p: a for p, a in adapters.items() if p not in own}, own


def _leaves(params: PyTree) -> dict[str, Any] | None:
    """The parameters by path; None if they are not given."""
    return None if params is None else tree.flatten(tree.split(params)[0])


def _rates(adapters: Adapters) -> set[float]:
    """The dropout rates of adapters; PEFT has no dropout on embeddings."""
    return {
        getattr(adapter, "dropout", 0.0)
        for path, adapter in adapters.items()
        if not adapter.replaces and not path.endswith("/embedding")
    }


def _settings(
    directory: pathlib.Path, residual: bool
) -> peft_config.Settings | peft_config.FormSettings:
    path = files.inside(directory, CONFIG)
    raw = files.read_json(path)
    try:
        settings = peft_config.read(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if settings.moved and not residual:
        raise ValueError(
            f"{path}: init_lora_weights={settings.moved!r} removed part of the base's "
            "kernels, so this adapter is wrong on the original base; convert it in "
            "PEFT with model.save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or load the residual base "
            "and pass residual=True"
        )
    return settings


def _nothing(directory: pathlib.Path) -> str:
    told = f"{directory} has no {TENSORS}"
    if pickles := sorted(p.name for p in directory.glob("adapter_model.*")):
        told += (
            f"; {pickles[0]} is a pickle, which can run code and is never read: load "
            "it in PEFT and call save_pretrained to write safetensors"
        )
    return told
