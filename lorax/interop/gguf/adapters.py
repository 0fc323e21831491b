"""GGUF LoRA files: adapters for llama.cpp, and back.

    <tensor>.lora_a   [rank, in]
    <tensor>.lora_b   [out, rank]        W + alpha / rank * lora_b @ lora_a

Of an embedding they are `[rows, rank]` and `[width, rank]`. alpha is one number for all
tensors; where scales differ, the ratio is folded into lora_b.

References:
  llama.cpp, https://github.com/ggml-org/llama.cpp: src/llama-adapter.cpp.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import gguf
import numpy as np

from lorax import compose, tree, untrusted
from lorax.adapters import Lora
from lorax.interop import assembly, files, peft_leaves
from lorax.interop.factors import Module
from lorax.interop.gguf import header, loading, metadata
from lorax.interop.gguf.header import Header
from lorax.interop.gguf.tensors import Tensor, turned
from lorax.interop.peft_base import WEIGHT, Base
from lorax.interop.peft_forms import near_whole
from lorax.models import llama
from lorax.types import Adapters

ENDS = (".lora_a", ".lora_b")


def save_adapters(
    path: str | pathlib.Path,
    adapters: Adapters,
    config: llama.Config,
    *,
    initial: Adapters | None = None,
) -> None:
    """Writes adapters that llama.cpp loads beside a model: `llama-cli --lora FILE`.

    What is not Lora is written as the Lora that it is (`compose.to_lora`): AdaLora,
    LoHa, LoKr, MiSS.

    Args:
      path: of the file, which is replaced.
      adapters: `{path: adapter}`.
      config: of the base, `model.config`.
      initial: what `lorax.init` returned, if it moved a part of the base's kernels
        (PiSSA, OLoRA, ...): what is written is then for the original base, at twice the
        rank.

    Raises:
      KeyError: a path that the model lacks.
      ValueError: adapters that do not fit it, that are no products of factors (Dora,
        Full, maps), on an embedding that is the head too, or not finite.
    """
    base = Base(config)
    tree.require(adapters, base.shapes, "model")
    for name, adapter in adapters.items():
        adapter.check(name, base.shapes[name])
        _require_pair(name, adapter, base)
    modules, _ = peft_leaves.split(compose.to_lora(adapters, initial), base)
    kind = _architecture(config)
    alpha = _alpha(modules)
    tensors = dict(_to_disk(modules, base, config, alpha))
    if odd := [key for key, tensor in tensors.items() if not files.is_finite(tensor)]:
        raise ValueError(f"{odd[0]!r} would hold NaN or infinity")
    file = gguf.GGUFWriter(path, kind)
    file.add_type(gguf.GGUFType.ADAPTER)
    file.add_string(gguf.Keys.Adapter.TYPE, "lora")
    file.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, tensor in tensors.items():
        file.add_tensor(key, tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def load_adapters(
    path: str | pathlib.Path, config: llama.Config, *, dropout: float = 0.0
) -> Adapters:
    """Reads a GGUF LoRA file.

    In a stack of layers, unequal ranks are padded with zeros.

    Args:
      path: of the file.
      config: of the base, `model.config`.
      dropout: static field of the adapters.

    Returns:
      `{path: Lora}`, in float32.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file that is not sound, not an adapter, or not for this base; the
        key or the tensor is named.
    """
    head = header.read(pathlib.Path(path))
    _require_lora(head, _architecture(config))
    alpha = head.field(gguf.Keys.Adapter.LORA_ALPHA, untrusted.number(), 0)
    base = Base(config)
    known = {name: key for key, name in loading.names(config).items()}
    pairs: dict[str, dict[str, header.Stored]] = {}
    for key, stored in head.tensors.items():
        name, end = key[: -len(ENDS[0])], key[-len(ENDS[0]) :]
        module = known.get(name, "").removesuffix(WEIGHT)
        if end not in ENDS or module not in base.modules:
            raise ValueError(
                f"{head.path}: {key!r} is not a factor of a matrix of the model; its "
                f"tensors are named such as 'blk.0.attn_q.weight{ENDS[0]}'"
            )
        pairs.setdefault(name, {})[end] = stored
    modules = []
    for name, pair in pairs.items():
        module = known[name].removesuffix(WEIGHT)
        modules.append(_module(head, name, module, pair, base, config, alpha))
    return assembly.adapters(modules, {}, base, dropout)


def _architecture(config: llama.Config) -> str:
    """llama.cpp's name of a model's architecture."""
    kind = getattr(config, "model_type", "")
    kind = "llama" if kind == "mistral" else kind
    if kind not in metadata.ARCHITECTURES:
        raise ValueError(
            f"{type(config).__module__}.{type(config).__qualname__} is not a config of "
            f"an architecture that is implemented: {', '.join(metadata.ARCHITECTURES)}"
        )
    return kind


def _require_pair(path: str, adapter: Any, base: Base) -> None:
    """Raises for what a file of pairs has no form for."""
    merged = "merge it (lorax.merge), save the model (hf.save) and convert that"
    if adapter.replaces:
        raise ValueError(
            f"{path}: GGUF LoRA files hold pairs of factors, and the adapter is "
            f"{type(adapter).__name__}, whole values; {merged}"
        )
    if base.head and path == base.where[base.embedding + WEIGHT].path:
        raise ValueError(
            f"{path} is embedding and head in one, for which llama.cpp has no "
            f"adapter; {merged}"
        )


def _alpha(modules: Sequence[Module]) -> float:
    """The alpha of most modules; llama.cpp takes 0 for a scale of 1."""
    alphas = [near_whole(module.scale * module.rank) for module in modules]
    most = Counter(alpha for alpha in alphas if alpha).most_common(1)
    return float(np.float32(most[0][0])) if most else 1.0


def _to_disk(
    modules: Sequence[Module], base: Base, config: llama.Config, alpha: float
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of all modules, by their names."""
    names, kind = loading.names(config), _architecture(config)
    for module in modules:
        a, b = (module.fields[field] for field in ("a", "b"))
        ratio = module.scale * module.rank / alpha
        if not np.isclose(ratio, 1, rtol=1e-7, atol=0):
            b = (b.astype(np.float64) * ratio).astype(np.float32)
        name = names[module.name + WEIGHT]
        b = b.T
        if heads := loading.heads_of(config, name, kind):
            b = turned(b, heads)
        a = a if base.is_embedding(module.name) else a.T
        for end, tensor in zip(ENDS, (a, b), strict=True):
            yield name + end, np.ascontiguousarray(tensor, np.float32)


def _require_lora(head: Header, kind: str) -> None:
    """Raises unless a file says that it is a LoRA for an architecture."""
    rules = {
        gguf.Keys.General.TYPE: "adapter",
        gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.General.ARCHITECTURE: kind,
    }
    for key, value in rules.items():
        given = head.field(key, untrusted.TEXT)
        if given != value:
            raise ValueError(
                f"{head.path}: {key}={untrusted.shown(given)}; an adapter for this "
                f"model has {value!r}"
            )
    if (key := gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS) in head.metadata:
        raise ValueError(
            f"{head.path}: {key}: the adapter acts only behind some tokens (aLoRA), "
            "which is not implemented"
        )


def _module(
    head: Header,
    name: str,
    module: str,
    pair: dict[str, header.Stored],
    base: Base,
    config: llama.Config,
    alpha: float,
) -> Module:
    """The factors of one matrix."""
    if missing := [end for end in ENDS if end not in pair]:
        raise ValueError(f"{head.path}: there is no {name + missing[0]!r}")
    if module == base.embedding:
        raise ValueError(
            f"{head.path}: {name + ENDS[0]!r} adapts an embedding that is the head "
            "too; load the base with tied=False, its head the embedding transposed"
        )
    inputs, outputs = base.sizes(module)
    first, second = (pair[end] for end in ENDS)
    rank = second.shape[-1]
    looked_up = base.is_embedding(module)
    need = ((inputs, rank) if looked_up else (rank, inputs)), (outputs, rank)
    if (first.shape, second.shape) != need:
        raise ValueError(
            f"{head.path}: {name + ENDS[0]!r} and {name + ENDS[1]!r} have shapes "
            f"{list(first.shape)} and {list(second.shape)}; of a map from {inputs} to "
            f"{outputs} they are {[*map(list, need)]}"
        )
    heads = loading.heads_of(config, name, _architecture(config))
    a = Tensor.of(first, np.float32).read().astype(np.float32)
    b = Tensor.of(second, np.float32, heads).read().astype(np.float32)
    fields = {"a": a if looked_up else a.T, "b": b.T}
    return Module(module, Lora, fields, {"scale": alpha / rank if alpha else 1.0})
