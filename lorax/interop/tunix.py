"""Loads adapters from tunix's LoRA checkpoints, and saves them in that form.

    adapters = tunix.load_adapters("run/100/model_params", model.config, alpha=16)
    rule = tunix.save_adapters("out", model.config, adapters)

`CheckpointManager.save(save_only_lora_params=True)` writes the nnx.LoRAParam that qwix
made: next to the weight of an einsum, `w_lora_a`, with the weight's input axes and then
the rank, and `w_lora_b`, with the rank and then the other axes; next to that of an
nnx.Linear, `kernel_lora_a` and `kernel_lora_b`. Below `layers/<i>`:

| Llama, Qwen 2 and 3 | Gemma 1 to 3 | a | b |
|---|---|---|---|
| attn/q_proj | attn/q_einsum | `[D, r]` | `[r, heads, H]` |
| attn/k_proj, attn/v_proj | | `[D, r]` | `[r, heads, H]` |
| | attn/kv_einsum | `[D, r]` | `[r, 2, heads, H]` |
| | attn/qkv_einsum, if heads = kv_heads | `[D, r]` | `[r, 3, heads, H]` |
| attn/o_proj | attn/attn_vec_einsum | `[heads, H, r]` | `[r, D]` |
| mlp/gate_proj, up_proj, down_proj | the same | `[in, r]` | `[r, out]` |

So the keys and values of a Gemma share a. If their adapters have different a, these are
concatenated along the rank, with zeros in b for the other parts.

References:
  google/tunix at c7d8950: tunix/sft/checkpoint_manager.py, tunix/models/{llama3,qwen2,
  qwen3,gemma,gemma3}/model.py; google/qwix at aa623ac: qwix/_src/providers/lora.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorax import tree, untrusted
from lorax.adapters import Lora
from lorax.interop import assembly, orbax_trees
from lorax.interop.factors import Module
from lorax.interop.orbax_trees import Rule
from lorax.interop.peft_base import Base
from lorax.types import Adapters

ENDS = "_lora_a", "_lora_b"
MLP: dict[str, tuple[str, ...]] = {
    "mlp/gate_proj/kernel": ("gate",),
    "mlp/up_proj/kernel": ("up",),
    "mlp/down_proj/kernel": ("down",),
}
LLAMA = MLP | {f"attn/{part}_proj/w": (part,) for part in "qkvo"}
OUT: dict[str, tuple[str, ...]] = {**MLP, "attn/attn_vec_einsum/w": ("o",)}
GEMMA = OUT | {"attn/q_einsum/w": ("q",), "attn/kv_einsum/w": ("k", "v")}
FUSED = OUT | {"attn/qkv_einsum/w": ("q", "k", "v")}
LAYERS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), GEMMA),
}
"""The weights of a layer and the kernels that each corresponds to, by model_type."""


def load_adapters(
    folder: str | os.PathLike[str], config: Any, *, alpha: float, dropout: float = 0.0
) -> Adapters:
    """Loads the LoRA parameters of a checkpoint.

    Args:
      folder: the tree's folder, `<step>/model_params`.
      config: the base's config, `model.config`.
      alpha: of the `qwix.LoraProvider`; tunix does not write it.
      dropout: static field of the adapters.

    Returns:
      `{path: Lora}`, in float32.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: leaves are not LoRA parameters for this model.
    """
    untrusted.check("alpha", alpha, untrusted.number())
    untrusted.check("dropout", dropout, untrusted.number(0, below=1))
    base, found = Base(config), orbax_trees.read(folder)
    names, places, modules = orbax_trees.names_of(base), _places(config), []
    for begin, (a, b) in orbax_trees.pairs(found, ENDS, folder).items():
        tree.require([begin], places, f"tunix's {config.model_type}")
        own, rank = [names[place] for place in places[begin]], a.shape[-1]
        for end, leaf, want in zip(ENDS, (a, b), _shapes(own, base, rank), strict=True):
            where = f"{folder}: {begin + end!r}"
            orbax_trees.require_shape(where, leaf.shape, want, config)
        a, b = a.reshape(-1, rank), b.reshape(rank, len(own), -1)
        for i, name in enumerate(own):
            fields = {"a": a, "b": b[:, i]}
            modules.append(Module(name, Lora, fields, {"scale": alpha / rank}))
    return assembly.adapters(modules, {}, base, dropout)


def save_adapters(
    folder: str | os.PathLike[str], config: Any, adapters: Adapters
) -> Rule:
    """Writes adapters as step 0 of a folder, for tunix's `CheckpointManager`.

    All get the largest rank and a common scale; smaller ranks are padded with zeros,
    and factors absorb ratios of scales. If only some layers have an adapter, the other
    layers get zeros.

    Args:
      folder: created if necessary; must not contain a step 0.
      config: the base's config, `model.config`.
      adapters: `{path: Lora}`, on linear maps in layers or on the head.

    Returns:
      What to create tunix's model with: `qwix.LoraProvider(**rule._asdict())`.

    Raises:
      KeyError: the model lacks a path.
      ValueError: tunix has no place for an adapter.
    """
    base = Base(config)
    tree.require(adapters, base.shapes, "model")
    modules = orbax_trees.uniform(adapters, base, "tunix")
    own, names = {m.name: m for m in modules}, orbax_trees.names_of(base)
    places = {
        begin: [names[part] for part in parts]
        for begin, parts in _places(config).items()
    }
    if left := sorted(own.keys() - {n for group in places.values() for n in group}):
        raise ValueError(
            f"{left[0]!r} has no weight of its own in tunix's {config.model_type}; "
            "leave it out of the Targets"
        )
    adapted = {n for n in places if any(module in own for module in places[n])}
    kinds = {_kind(begin) for begin in adapted}
    made = {
        begin: _side_by_side([own.get(name) for name in group], group, base)
        for begin, group in places.items()
        if _kind(begin) in kinds
    }
    rank = max(a.shape[1] for a, _ in made.values())
    leaves = {}
    for begin, (a, b) in made.items():
        more = rank - a.shape[1]
        a, b = np.pad(a, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0)))
        shapes = _shapes(places[begin], base, rank)
        for end, leaf, shape in zip(ENDS, (a, b), shapes, strict=True):
            keys = *begin.replace("layers_", "layers/").split("/"), "value"
            keys = *keys[:-2], keys[-2] + end, "value"
            leaves[keys] = leaf.reshape(shape).astype(np.float32)
    orbax_trees.write(folder, "model_params", orbax_trees.nested(leaves))
    regex = "|".join(f".*{kind}" for kind in sorted(kinds))
    return Rule(regex, rank, modules[0].scale * rank)


def _places(config: Any) -> dict[str, list[tuple[str, int | None]]]:
    """The kernels that each of tunix's weights corresponds to."""
    if config.model_type not in LAYERS:
        raise ValueError(
            f"model_type={config.model_type!r}: tunix's layout is known here only for "
            f"{', '.join(LAYERS)}"
        )
    layer, gemma = LAYERS[config.model_type], LAYERS[config.model_type] is GEMMA
    if gemma and config.heads == config.kv_heads:
        layer = FUSED
    found: dict[str, list[tuple[str, int | None]]] = {
        f"layers_{i}/{name}": [(f"{part}/kernel", i) for part in parts]
        for i in range(config.layers)
        for name, parts in layer.items()
    }
    return (
        found
        if gemma or config.tied
        else {**found, "lm_head/w": [("head/kernel", None)]}
    )


def _kind(begin: str) -> str:
    """The module that a weight belongs to, in any layer."""
    return "/".join(part for part in begin.split("/")[:-1] if "layers_" not in part)


def _shapes(
    group: Sequence[str], base: Base, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a and b for one of tunix's weights."""
    place = base.modules[group[0]]
    shape, inputs = place.own(base.shapes[place.path].shape), place.entry.inputs
    parts = (len(group),) if len(group) > 1 else ()
    return (*shape[:inputs], rank), (rank, *parts, *shape[inputs:])


def _side_by_side(
    modules: Sequence[Module | None], group: Sequence[str], base: Base
) -> tuple[np.ndarray, np.ndarray]:
    """`[in, rank]` and `[rank, parts x out]`; equal a are kept only once."""
    sizes = [base.sizes(name) for name in group]
    own = [(i, m.fields["a"], m.fields["b"]) for i, m in enumerate(modules) if m]
    firsts = [a for _, a, _ in own] or [np.zeros((sizes[0][0], 1), np.float32)]
    shared = all(np.array_equal(a, firsts[0]) for a in firsts)
    factors = firsts[:1] if shared else firsts
    b = np.zeros((sum(a.shape[1] for a in factors), sum(out for _, out in sizes)))
    ends, row = np.cumsum([out for _, out in sizes]), 0
    for i, a, part in own:
        b[row : row + a.shape[1], ends[i] - sizes[i][1] : ends[i]] = part
        row += 0 if shared else a.shape[1]
    return np.concatenate(factors, axis=1), b
