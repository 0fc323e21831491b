"""Reads and writes MaxText's checkpoints: base weights and LoRA in Orbax trees.

    params = maxtext.load("llama3.1-8b/0/items", model.config)
    adapters = maxtext.load_adapters("lora/0/items", model.config, alpha=16)

A tree is in `<step>/items`, with its leaves below params/params. With `scan_layers` a
stack has its layers on axis 1 (`param_scan_axis`): a query kernel is `[embed, layers,
heads, head_dim]`. Gemma 3 scans blocks of six layers, `decoder/layers/layers_0` to
`layers_5`; the remaining layers are `decoder/layers_remainder`. Without `scan_layers`
the layers are `decoder/layers_0` and so on.

| | how its values differ from those of transformers |
|---|---|
| Llama, Mistral | queries times head_dim^-0.5 |
| with Llama 3.1's rope | and pairs (i, i + half) of queries and keys are neighbours |
| Gemma 3 | norms plus one; the embedding times sqrt(width), rounded to bfloat16 |

LoRA is qwix's: next to `kernel` are `kernel_lora_a` `[in, layers, rank]` and
`kernel_lora_b` `[rank, layers, out]`, with heads and head_dim as one axis. The scale is
not among the leaves: `lora` in the metadata of the step has rank and alpha.

References:
  AI-Hypercomputer/maxtext at e591f30, below src/maxtext/checkpoint_conversion: names
  and values in utils/param_mapping.py (LLAMA31_, GEMMA3_) and standalone_scripts/
  llama_mistral_mixtral_orbax_to_hf.py, axes and LoRA in to_maxtext.py; the folder in
  src/maxtext/common/checkpointing.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from lorax import tree, untrusted
from lorax.adapters import Lora
from lorax.interop import assembly, maxtext_layout, orbax_trees
from lorax.interop.factors import Module
from lorax.interop.orbax_trees import Rule
from lorax.interop.peft_base import Base
from lorax.types import Adapters, PyTree

AXIS = 1
"""The axis of a stack that indexes its layers."""

ENDS = "/kernel_lora_a", "/kernel_lora_b"


def load(
    folder: str | os.PathLike[str], config: Any, *, shardings: PyTree | None = None
) -> PyTree:
    """Loads the weights of a checkpoint, without the optimiser's state.

    Host memory holds all weights twice.

    Args:
      folder: the tree's folder, `<step>/items`.
      config: the model's config, such as `llama.Config.from_hf(json.loads(...))`, since
        MaxText's trees contain none. Rows of the embedding beyond its vocabulary are
        padding, and are left out.
      shardings: a tree of `jax.sharding.Sharding` like the parameters; None: the
        default device.

    Returns:
      The parameters, in `config.param_dtype`.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it does not hold a tree of this model, or the model's layout is not
        known here.
    """
    found = _bare(orbax_trees.read(folder, _is_weight))
    places = maxtext_layout.places(config, scanned=not _apart(found))
    missing, extra = places.keys() - found.keys(), found.keys() - places.keys()
    if missing or extra:
        raise ValueError(
            f"{folder}: the leaves do not match {config.model_type!r} with "
            f"{config.layers} layers; missing: {untrusted.some(sorted(missing))}; "
            f"left over: {untrusted.some(sorted(extra))}"
        )
    shapes = Base(config).shapes
    flat = {p: np.empty(s.shape, config.param_dtype) for p, s in shapes.items()}
    for name, place in places.items():
        own = [_slot(flat, place.name, layer, config) for layer in place.numbers]
        leaf = found[name]
        if place.name == "embed/embedding":
            leaf = leaf[: config.vocabulary]
        stacked = place.stacked
        want = (*own[0].shape[:AXIS], *[len(own)] * stacked, *own[0].shape[AXIS:])
        orbax_trees.require_shape(f"{folder}: {name!r}", leaf.shape, want, config)
        change = maxtext_layout.change_of(place.name, config)
        parts = np.moveaxis(leaf, AXIS, 0) if stacked else leaf[None]
        for target, part in zip(own, parts, strict=True):
            target[...] = change.undo(part)
    where = {} if shardings is None else tree.flatten(shardings)
    put = {path: jax.device_put(leaf, where.get(path)) for path, leaf in flat.items()}
    return flax.traverse_util.unflatten_dict(put, sep="/")


def save(
    folder: str | os.PathLike[str],
    config: Any,
    params: PyTree,
    *,
    scan_layers: bool = True,
    vocabulary: int | None = None,
) -> None:
    """Writes weights for MaxText's `load_parameters_path=<folder>/0/items`.

    Args:
      folder: created if necessary; must not contain a step 0.
      config: the model's config.
      params: the model's parameters, such as those that `lorax.merge` returns.
      scan_layers: as in MaxText.
      vocabulary: rows of the embedding in MaxText's model (its `vocab_size`); rows
        beyond the model's own are zeros. None: the model's own number.

    Raises:
      ValueError: the model's layout is not known here, the tree is not the model's, or
        the vocabulary is too small.
    """
    places, flat = maxtext_layout.places(config, scan_layers), tree.flatten(params)
    if odd := flat.keys() ^ Base(config).shapes.keys():
        raise ValueError(
            f"these are not the parameters of the model: {untrusted.some(sorted(odd))}"
        )
    if small := [path for path, leaf in flat.items() if tree.is_quantized(leaf)]:
        raise ValueError(
            f"{small[0]}: the leaf is quantised; write lorax.merge({{}}, params)"
        )
    rows = vocabulary or config.vocabulary
    if rows < config.vocabulary:
        raise ValueError(
            f"vocabulary={rows}, but the model has {config.vocabulary} tokens; shrink "
            "it with hf.resize_embeddings first"
        )
    leaves = {}
    for name, place in places.items():
        change = maxtext_layout.change_of(place.name, config)
        own = [_slot(flat, place.name, layer, config) for layer in place.numbers]
        parts = [change.apply(np.asarray(x)) for x in own]
        stacked = place.stacked
        whole = np.stack(parts, axis=AXIS) if stacked else parts[0]
        if place.name == "embed/embedding":
            whole = np.pad(whole, ((0, rows - config.vocabulary), (0, 0)))
        leaves["params", "params", *name.split("/")] = whole.astype(own[0].dtype)
    state = {**orbax_trees.nested(leaves), "step": 0, "opt_state": {}}
    orbax_trees.write(folder, "items", state, {"scan_layers": scan_layers})


def load_adapters(
    folder: str | os.PathLike[str], config: Any, *, alpha: float, dropout: float = 0.0
) -> Adapters:
    """Loads the LoRA parameters of a checkpoint.

    Args:
      folder: the tree's folder, `<step>/items`.
      config: the base's config, `model.config`.
      alpha: as in training, `lora.lora_alpha`.
      dropout: static field of the adapters.

    Returns:
      `{path: Lora}`, in float32.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: leaves are not LoRA parameters for this model.
    """
    untrusted.check("alpha", alpha, untrusted.number())
    untrusted.check("dropout", dropout, untrusted.number(0, below=1))
    base, found = Base(config), _bare(orbax_trees.read(folder, _is_weight))
    names, modules = orbax_trees.names_of(base), []
    places = maxtext_layout.places(config, scanned=not _apart(found))
    for begin, (a, b) in orbax_trees.pairs(found, ENDS, folder).items():
        place = places.get(f"{begin}/kernel")
        if place is None or place.layers is None:
            raise ValueError(
                f"{folder}: {begin!r} is not a linear map in a layer of this model"
            )
        stacked, numbers = place.stacked, place.numbers
        in_, out = base.sizes(names[place.name, numbers[0]])
        own, rank = [len(numbers)] * stacked, a.shape[-1]
        for end, leaf, want in (
            (ENDS[0], a, (in_, *own, rank)),
            (ENDS[1], b, (rank, *own, out)),
        ):
            where = f"{folder}: {begin + end!r}"
            orbax_trees.require_shape(where, leaf.shape, want, config)
        if not stacked:
            a, b = np.expand_dims(a, AXIS), np.expand_dims(b, AXIS)
        change = maxtext_layout.change_of(place.name, config)
        for i, layer in enumerate(numbers):
            fields = {"a": a[:, i], "b": change.undo(b[:, i])}
            name = names[place.name, layer]
            modules.append(Module(name, Lora, fields, {"scale": alpha / rank}))
    return assembly.adapters(modules, {}, base, dropout)


def save_adapters(
    folder: str | os.PathLike[str],
    config: Any,
    adapters: Adapters,
    *,
    scan_layers: bool = True,
) -> Rule:
    """Writes adapters for MaxText's `lora.lora_restore_path=<folder>/0/items`.

    All get the largest rank and a common scale; smaller ranks are padded with zeros,
    and factors absorb ratios of scales. Layers of a stack without adapters get zeros.

    Args:
      folder: created if necessary; must not contain a step 0.
      config: the base's config, `model.config`.
      adapters: `{path: Lora}`, on linear maps in layers.
      scan_layers: as in MaxText.

    Returns:
      MaxText's `lora.lora_module_path`, `lora.lora_rank` and `lora.lora_alpha`.

    Raises:
      KeyError: the model lacks a path.
      ValueError: MaxText has no place for an adapter.
    """
    base = Base(config)
    tree.require(adapters, base.shapes, "model")
    modules = orbax_trees.uniform(adapters, base, "MaxText")
    own, names = {m.name: m for m in modules}, orbax_trees.names_of(base)
    rank, leaves, used = modules[0].rank, {}, set()
    for name, place in maxtext_layout.places(config, scan_layers).items():
        if place.layers is None or not name.endswith("/kernel"):
            continue
        here = [names[place.name, layer] for layer in place.numbers]
        if not {*here} & own.keys():
            continue
        (in_, out), change = (
            base.sizes(here[0]),
            maxtext_layout.change_of(place.name, config),
        )
        empty = {"a": np.zeros((in_, rank)), "b": np.zeros((rank, out))}
        fields = [own[n].fields if n in own else empty for n in here]
        used |= {*here}
        b = [change.apply(f["b"]) for f in fields]
        for end, parts in zip(ENDS, ([f["a"] for f in fields], b), strict=True):
            stacked = place.stacked
            whole = np.stack(parts, axis=AXIS) if stacked else parts[0]
            keys = (name.removesuffix("/kernel") + end).split("/")
            leaves["params", "params", *keys] = whole.astype(np.float32)
    if left := sorted(own.keys() - used):
        raise ValueError(
            f"{left[0]!r} is not a linear map in a layer, and MaxText adapts only "
            "these; leave it out of the Targets"
        )
    rule = Rule(_regex(leaves), rank, modules[0].scale * rank)
    told = {"enable_lora": True, "lora_rank": rank, "lora_alpha": rule.alpha}
    state = {**orbax_trees.nested(leaves), "step": 0, "opt_state": {}}
    metadata = {"scan_layers": scan_layers, "lora": told}
    orbax_trees.write(folder, "items", state, metadata)
    return rule


def _slot(
    flat: Mapping[str, Any], name: str, layer: int | None, config: Any
) -> np.ndarray:
    """The slice of our leaf that belongs to this layer."""
    if layer is None:
        return flat[name]
    return (
        flat[f"layers/{name}"][layer] if config.scan else flat[f"layers_{layer}/{name}"]
    )


def _is_weight(name: str) -> bool:
    """True for parameters, not for the optimiser's state, steps and keys."""
    parts = name.split("/")
    state = parts[0] in ("opt_state", "optimizer", "step", "nnx_aux")
    return not state and not any(part.endswith("rngs") for part in parts)


def _bare(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The leaves without enclosing collections: Linen's, or the "base" of RL runs."""

    def bare(name: str) -> str:
        for around in ("params/", "params/", "base/"):
            name = name.removeprefix(around)
        return name

    return {bare(name): leaf for name, leaf in found.items()}


def _apart(found: Mapping[str, Any]) -> bool:
    """True if the layers are not scanned."""
    return any(name.startswith("decoder/layers_0/") for name in found)


def _regex(leaves: Mapping[tuple[str, ...], Any]) -> str:
    """A pattern that matches the modules that have factors, in any layer."""
    ends = sorted({"/".join(keys[-3:-1]) for keys in leaves})
    return f"decoder/.*({'|'.join(ends)})"
