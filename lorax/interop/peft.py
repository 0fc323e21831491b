"""PEFT's adapters: `adapter_config.json` and `adapter_model.safetensors`, both ways.

    adapters = peft.load("path/or/hub-id", model.config)
    peft.save("mine", adapters, model.config, base_name="meta-llama/Llama-3.2-1B")

LoRA, rsLoRA, DoRA and AdaLoRA on linear maps and embeddings, the types of `peft_table`
on the linear maps that PEFT adapts so, and modules stored whole. What is written
computes in PEFT what it computes here, and back. A tied embedding and head are one leaf
here, so an adapter on it is written for both; PEFT's adapters of only one of them need
a model with `tied=False`. (Never merge an adapter of tied weights in PEFT:
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
      `{path: adapter}`, in float32.

    Raises:
      FileNotFoundError: no such files.
      ValueError: a file that is not sound or not for this base, or a field of its
        config that is not implemented; file and key are named. One with frozen arrays
        (VeRA's projections): see `load_with_base`.
    """
    adapters, frozen = _load(source, config, params, residual, revision)
    if frozen:
        raise ValueError(
            f"{source}: {', '.join(sorted(frozen))} do not train and belong to the "
            "second argument; call peft.load_with_base(source, config, params), which "
            "returns (adapters, params) with them"
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
    """Reads an adapter of PEFT, with what of it does not train: VeRA's projections.

    Args:
      source: a directory, or the id of an adapter on the hub.
      config: of the base, `model.config`.
      params: of the base.
      residual: as in `load`.
      revision: of the hub's repository.

    Returns:
      Adapters, and params; a `lorax.Base` of them where there are frozen arrays, as
      from `lorax.init`.

    Raises:
      FileNotFoundError: no such files.
      ValueError: as in `load`; another array under a name that `params.frozen` has.
    """
    adapters, found = _load(source, config, params, residual, revision)
    plain, held = tree.split(params)
    for name, array in found.items():
        if name in held and not np.array_equal(held[name], array):
            raise ValueError(
                f"{source}: params have another frozen array {name!r}; pass the "
                "parameters alone, and keep the two sets of adapters apart"
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

    Triplets that are zero in every factor are padding and are left out; of AdaLoRA that
    is the pruned form, after `lorax.optim.adalora_shrink`.

    Args:
      directory: made if need be; files of the same names are replaced.
      adapters: `{path: adapter}`, of one parametrisation beside Full.
      config: of the base, `model.config`.
      params: of the base, as from `lorax.init`; needed by methods that PEFT writes with
        frozen arrays (VeRA, RandLoRA), norms of the kernels (DeLoRA) or rows of the
        embedding (Rows).
      base_name: of the base, for `base_model_name_or_path`.
      initial: what `lorax.init` returned, if it moved a part of the base's kernels
        (PiSSA, MiLoRA, LoRA-GA, OLoRA, CorDA): what is written is then for the original
        base, at twice the rank.
      residual: True, without `initial`: write such adapters as they are, for the base
        that their init left.
      rank_stabilized: write alpha for rsLoRA's alpha / sqrt(rank); the function is the
        same.
      uniform: write one rank and one alpha for all modules, the largest rank, zeros in
        the others and ratios of scales in B: for engines that read no patterns (vLLM,
        SGLang; see `lorax.interop.engines`). The function is the same.
      fields: of the config, that say nothing of the function (`task_type`,
        `total_step`, ...), `lora_dropout`, and of a base that `replicate_layers` made
        its `layer_replication`.

    Raises:
      KeyError: a path that the model lacks.
      ValueError: adapters that do not fit it, or that PEFT has no form for; ones whose
        init moved the base, without `initial` or `residual`.
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
    adapters = {  # PEFT has one adapter a module
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
    (directory / CONFIG).unlink(missing_ok=True)  # never beside another's tensors
    safetensors.numpy.save_file(tensors, directory / TENSORS, {"format": "pt"})
    text = json.dumps(written, indent=2, sort_keys=True, allow_nan=False)
    (directory / CONFIG).write_text(text + "\n")


class _Form(NamedTuple):
    """How `save` was asked to write; see its arguments."""

    base: peft_base.Base
    params: PyTree
    rank_stabilized: bool
    uniform: bool
    given: dict[str, Any]


def _with_factors(
    adapters: Adapters, rows: peft_rows.Written, form: _Form
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the config of adapters with factors, and of what is beside."""
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
    """Returns `{key: tensor}` of the modules, and of what they share."""
    _, frozen = tree.split(params)
    leaves = _leaves(params) or {}
    tensors: dict[str, np.ndarray] = {}
    places = [peft_tensors.place_of(m.name, {}, base, leaves) for m in modules]
    for module, place in zip(modules, places, strict=True):
        if form := peft_table.FORMS.get(kind):
            peft_forms.require_module(form, module.name, base)
        elif place.embedding and kind == "adalora":
            raise ValueError(
                f"{module.name!r} is an embedding, on which PEFT has no AdaLoRA; "
                "compose.to_lora writes it as plain LoRA"
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
            f"uniform=True gives modules of Lora or Dora one rank, and not {what}; "
            "choose one rank and one alpha in the Targets"
        )
    return factors.alike(modules) if modules else modules


def _experts(
    adapters: Adapters, kind: str, base: peft_base.Base
) -> tuple[Adapters, dict[str, Any]]:
    """Returns the adapters of modules, and those of the kernels of all experts."""
    paths = {place.path for place in base.parameters.values()}
    own = {p: a for p, a in adapters.items() if p in paths and not a.replaces}
    if own and kind != "lora":
        raise ValueError(
            f"{min(own)}: PEFT adapts experts by plain Lora alone (target_parameters), "
            f"and this is {kind}; merge it (lorax.merge) and save the model"
        )
    return {p: a for p, a in adapters.items() if p not in own}, own


def _leaves(params: PyTree) -> dict[str, Any] | None:
    """The parameters by path; None where they are not given."""
    return None if params is None else tree.flatten(tree.split(params)[0])


def _rates(adapters: Adapters) -> set[float]:
    """The dropout rates of adapters; PEFT has none on embeddings."""
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
