"""Loads checkpoints of loralib, the LoRA authors' library, as adapters.

    <module>.lora_A   [rank, in]
    <module>.lora_B   [out, rank]

Everything else in the file was trained in full. The file does not contain the scale,
alpha / rank. A `MergedLinear` divides its outputs into equal blocks and adapts some of
them (q and v of GPT-2's fused kernel), each with factors of its own:

    lora_A   [blocks x rank, in]
    lora_B   [blocks x width, rank]

and becomes one Lora of the summed rank, with zeros in b for the other blocks.

References:
  Hu et al., LoRA, arXiv:2106.09685; https://github.com/microsoft/LoRA.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorax import tree, untrusted
from lorax.adapters import Lora
from lorax.interop import assembly, files, hf
from lorax.interop.factors import Module
from lorax.interop.peft_base import Base
from lorax.types import Adapters

ENDS = (".lora_A", ".lora_B")


def load(
    path: str | pathlib.Path,
    config: Any,
    *,
    alpha: float,
    merged: Sequence[bool] | None = None,
    dropout: float = 0.0,
) -> Adapters:
    """Loads a loralib checkpoint that was converted to safetensors.

    Args:
      path: the file.
      config: the base's config, `model.config`.
      alpha: as in training: 16 in the paper's GLUE runs, 32 in its GPT-2 runs.
      merged: `enable_lora` of `MergedLinear`: which blocks of its outputs are adapted;
        `(True, False, True)` in the GPT-2 runs. None: no module is a MergedLinear.
      dropout: static field of the adapters.

    Returns:
      `{path: Lora | Full}`, in float32.

    Raises:
      ValueError: the file is damaged, does not belong to this base, or is a pickle.
    """
    untrusted.check("alpha", alpha, untrusted.number())
    untrusted.check("dropout", dropout, untrusted.number(0, below=1))
    if merged is not None and not any(merged):
        raise ValueError(
            f"merged={merged!r} adapts no block; if there is no MergedLinear, use None"
        )
    path = pathlib.Path(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        raise ValueError(
            f"{path} is a pickle, which can run code and is never read: save its "
            "state dict with safetensors.torch.save_file"
        )
    base = Base(config)
    family = hf.family_of(config.to_hf(), "config")
    named: dict[str, files.Tensor] = {}
    for key, tensor in files.open_tensors(path).items():
        name = hf.renamed(family, key)
        if name in named:
            raise ValueError(
                f"{path}: {key!r} and {named[name].key!r} name the same tensor"
            )
        named[name] = tensor
    names = sorted({k.removesuffix(e) for k in named for e in ENDS if k.endswith(e)})
    rest = {k: t for k, t in named.items() if not k.endswith(ENDS)}
    try:
        for name in names:
            _check(name, named, base, merged)
        for key, tensor in rest.items():
            tree.require([key], base.where, "base model")
            if tensor.shape != base.shape(key):
                raise ValueError(f"{key!r} is {tensor.shape}, not {base.shape(key)}")
            tensor.require_floating()
        modules = [_module(name, named, base, alpha, merged) for name in names]
        saved = {key: tensor.read() for key, tensor in rest.items()}
        return assembly.adapters(modules, saved, base, dropout)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error.args[0]}") from error


def _check(
    name: str, named: dict[str, files.Tensor], base: Base, merged: Sequence[bool] | None
) -> None:
    """Raises unless the two factors fit each other and the base."""
    tree.require([name], base.modules, "base model")
    base.require_one(name)
    if name == base.embedding:
        raise ValueError(
            f"{name!r} is also the tied head, which loralib does not adapt; load the "
            "base with tied=False"
        )
    tree.require([name + end for end in ENDS], named, "file")
    a, b = (named[name + end].shape for end in ENDS)
    for end in ENDS:
        named[name + end].require_floating()
    in_, out = base.sizes(name)
    pair = " and ".join(repr(name + end) for end in ENDS)
    rank = b[-1] if b else 0
    if rank < 1:
        raise ValueError(
            f"{name + ENDS[1]!r} has shape {b}; its last axis, the rank, must be >= 1"
        )
    if (a, b) == ((rank, in_), (out, rank)):
        return
    if merged is None:
        raise ValueError(
            f"{pair} have shapes {a} and {b}, which do not fit a map from {in_} to "
            f"{out}; if it was a MergedLinear, pass its enable_lora as merged="
        )
    blocks, width = sum(merged), out // len(merged)
    want = (blocks * rank, in_), (blocks * width, rank)
    if (a, b) != want or width * len(merged) != out:
        raise ValueError(
            f"{pair} have shapes {a} and {b}, but merged={tuple(merged)} with {out} "
            f"outputs requires {want[0]} and {want[1]}"
        )


def _module(
    name: str,
    named: dict[str, files.Tensor],
    base: Base,
    alpha: float,
    merged: Sequence[bool] | None,
) -> Module:
    a, b = (named[name + end].read().astype(np.float32) for end in ENDS)
    rank, out = b.shape[1], base.sizes(name)[1]
    if b.shape[0] == out and a.shape[0] == rank:
        return _lora(name, a.T, b.T, alpha / rank)
    assert merged is not None
    width = out // len(merged)
    whole = np.zeros((a.shape[0], out), np.float32)
    for i, block in enumerate(np.flatnonzero(merged)):
        own = b[i * width : (i + 1) * width].T
        whole[i * rank : (i + 1) * rank, block * width : (block + 1) * width] = own
    return _lora(name, a.T, whole, alpha / rank)


def _lora(name: str, a: np.ndarray, b: np.ndarray, scale: float) -> Module:
    return Module(name, Lora, {"a": a, "b": b}, {"scale": scale})
