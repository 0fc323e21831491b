"""GGUF LoRA files: saves adapters for llama.cpp, and loads them.

    <tensor>.lora_a   [rank, in]
    <tensor>.lora_b   [out, rank]        W + alpha / rank * lora_b @ lora_a

For an embedding they are `[rows, rank]` and `[width, rank]`. alpha is the same for all
tensors; if scales differ, the ratio is folded into lora_b.

References:
  llama.cpp, https://github.com/ggml-org/llama.cpp: src/llama-adapter.cpp.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    """Writes adapters that llama.cpp loads with a model: `llama-cli --lora FILE`.

    AdaLora, LoHa, LoKr and MiSS are converted to the equivalent Lora
    (`compose.to_lora`).

    Args:
      path: the file, which is replaced if it exists.
      adapters: `{path: adapter}`.
      config: the base's config, `model.config`.
      initial: what `lorax.init` returned, if it changed the base's kernels (PiSSA,
        OLoRA, ...): the adapters are then written for the original base, at twice the
        rank.

    Raises:
      KeyError: the model lacks a path.
      ValueError: adapters do not fit the model, are not products of factors (Dora,
        Full, maps), are on an embedding that is also the head, or are not finite.
    """
    model = _Model.of(config)
    tree.require(adapters, model.base.shapes, "model")
    for name, adapter in adapters.items():
        adapter.check(name, model.base.shapes[name])
        _require_pair(name, adapter, model.base)
    modules, _ = peft_leaves.split(compose.to_lora(adapters, initial), model.base)
    alpha = _alpha(modules)
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        tensors |= _to_disk(module, model, alpha)
    if odd := [key for key, tensor in tensors.items() if not files.is_finite(tensor)]:
        raise ValueError(f"{odd[0]!r} would hold NaN or infinity")
    file = gguf.GGUFWriter(path, model.architecture)
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
    """Loads a GGUF LoRA file.

    In a stack of layers, unequal ranks are padded with zeros.

    Args:
      path: the file.
      config: the base's config, `model.config`.
      dropout: static field of the adapters.

    Returns:
      `{path: Lora}`, in float32.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged, not an adapter, or not for this base; the message
        names the key or the tensor.
    """
    model, head = _Model.of(config), header.read(pathlib.Path(path))
    _require_lora(head, model.architecture)
    alpha = head.field(gguf.Keys.Adapter.LORA_ALPHA, untrusted.number(), 0)
    pairs: dict[str, dict[str, header.Stored]] = {}
    for key, stored in head.tensors.items():
        name, end = key[: -len(ENDS[0])], key[-len(ENDS[0]) :]
        if end not in ENDS or name not in model.names.values():
            raise ValueError(
                f"{head.path}: {key!r} is not a factor of a matrix of the model; "
                f"tensors have names like 'blk.0.attn_q.weight{ENDS[0]}'"
            )
        pairs.setdefault(name, {})[end] = stored
    modules = []
    for module, name in model.names.items():
        if name in pairs:
            try:
                modules.append(_from_disk(module, pairs[name], model, alpha))
            except ValueError as error:
                raise ValueError(f"{head.path}: {name}: {error}") from error
    return assembly.adapters(modules, {}, model.base, dropout)


class _Model(NamedTuple):
    """The base as both programs see it.

    Attributes:
      base: modules by torch's names.
      config: the base's config.
      architecture: its name in llama.cpp.
      names: the names of the matrices in a GGUF file, by module.
    """

    base: Base
    config: llama.Config
    architecture: str
    names: dict[str, str]

    @classmethod
    def of(cls, config: llama.Config) -> _Model:
        """Returns the model of a config.

        Raises:
          ValueError: the config is of another family.
        """
        kind = getattr(config, "model_type", "")
        kind = "llama" if kind == "mistral" else kind
        if kind not in metadata.ARCHITECTURES:
            raise ValueError(
                f"{type(config).__module__}.{type(config).__qualname__} is not the "
                "config of a supported architecture: "
                f"{', '.join(metadata.ARCHITECTURES)}"
            )
        base = Base(config)
        spelled = loading.names(config)
        known = {m: spelled[m + WEIGHT] for m in base.modules if m + WEIGHT in spelled}
        return cls(base, config, kind, known)


def _require_pair(path: str, adapter: Any, base: Base) -> None:
    """Raises ValueError for an adapter that pairs of factors cannot represent."""
    merged = "merge it (lorax.merge), save the model (hf.save) and convert that"
    if adapter.replaces:
        raise ValueError(
            f"{path}: GGUF LoRA files hold pairs of factors, but the adapter is "
            f"{type(adapter).__name__}, with full values; {merged}"
        )
    if base.head and path == base.where[base.embedding + WEIGHT].path:
        raise ValueError(
            f"{path} is embedding and head in one, for which llama.cpp has no "
            f"adapter; {merged}"
        )


def _alpha(modules: Sequence[Module]) -> float:
    """The alpha that most modules have; llama.cpp treats 0 as a scale of 1."""
    alphas = [near_whole(module.scale * module.rank) for module in modules]
    largest = np.finfo(np.float32).max
    most = Counter(a for a in alphas if 0 < abs(a) <= largest).most_common(1)
    return float(np.float32(most[0][0])) if most else 1.0


def _to_disk(module: Module, model: _Model, alpha: float) -> dict[str, np.ndarray]:
    """The tensors of a module, by name."""
    a, b = (module.fields[field] for field in ("a", "b"))
    ratio = module.scale * module.rank / alpha
    if not np.isclose(ratio, 1, rtol=1e-7, atol=0):
        b = b.astype(np.float64) * ratio
    rows, name = b.T, model.names[module.name]
    if heads := loading.heads_of(model.config, name):
        rows = turned(rows, heads)
    pair = a if model.base.is_embedding(module.name) else a.T, rows
    return {
        name + end: np.ascontiguousarray(tensor, np.float32)
        for end, tensor in zip(ENDS, pair, strict=True)
    }


def _require_lora(head: Header, kind: str) -> None:
    """Raises ValueError unless a file says that it is a LoRA for this architecture."""
    rules = {
        gguf.Keys.General.TYPE: "adapter",
        gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.General.ARCHITECTURE: kind,
    }
    for key, value in rules.items():
        given = head.field(key, untrusted.TEXT)
        if given != value:
            raise ValueError(
                f"{head.path}: {key}={untrusted.shown(given)}; for an adapter of this "
                f"model it must be {value!r}"
            )
    if (key := gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS) in head.metadata:
        raise ValueError(
            f"{head.path}: {key}: the adapter acts only after certain tokens (aLoRA), "
            "which is not implemented"
        )


def _from_disk(
    module: str, pair: dict[str, header.Stored], model: _Model, alpha: float
) -> Module:
    """The factors of a module; the shapes of the pair are checked before reading."""
    if missing := [end for end in ENDS if end not in pair]:
        raise ValueError(f"it has no {missing[0]!r}")
    if module == model.base.embedding:
        raise ValueError(
            "the adapter is on an embedding that is also the head; load the base with "
            "tied=False and set its head to the transposed embedding"
        )
    inputs, outputs = model.base.sizes(module)
    looked_up = model.base.is_embedding(module)
    a, b = (pair[end] for end in ENDS)
    rank = b.shape[-1]
    need = ((inputs, rank) if looked_up else (rank, inputs)), (outputs, rank)
    if (a.shape, b.shape) != need:
        raise ValueError(
            f"its factors have shapes {list(a.shape)} and {list(b.shape)}; for a map "
            f"from {inputs} to {outputs} they must be {list(need[0])} and "
            f"{list(need[1])}"
        )
    heads = loading.heads_of(model.config, model.names[module])
    first = Tensor.of(a, np.float32).read().astype(np.float32)
    rows = Tensor.of(b, np.float32, heads).read().astype(np.float32)
    fields = {"a": first if looked_up else first.T, "b": rows.T}
    return Module(module, Lora, fields, {"scale": alpha / rank if alpha else 1.0})
