"""Loads Llama-family models from GGUF files, dense or with the files' own codes.

    model, params = gguf.load("model.Q4_K_M.gguf", quantize="file")
    logits = lorax.adapt(forward)({}, params, tokens)

Everything that the header shows is checked before the first weight is read.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import gguf
import jax
import jax.numpy as jnp
import numpy as np

from lorax import tree, untrusted
from lorax.interop import hf, leaves, packed
from lorax.interop.gguf import header, metadata
from lorax.interop.gguf.header import Header
from lorax.interop.gguf.leaves import Part, plans
from lorax.interop.gguf.tensors import Tensor
from lorax.models import llama, table
from lorax.quantization import Rules
from lorax.types import PyTree

FILE = "file"
"""In place of rules: keep the file's codes."""

TURNED = ("llama", "mistral")
"""Model types whose queries and keys llama.cpp stores in its own order."""


def load(
    path: str | pathlib.Path,
    *,
    quantize: Rules | None = None,
    shardings: PyTree | Callable[[nn.Module, PyTree], PyTree] | None = None,
    dtype: Any = None,
    **switches: Any,
) -> tuple[nn.Module, PyTree]:
    """Loads a model of the Llama family.

    Tensors are read one at a time; `gguf.quants.dequantize` decodes blocks.

    Args:
      path: the file.
      quantize: "file" keeps the codes of linear maps as they are (Q4_0, Q4_1, Q5_0,
        Q5_1, Q8_0, Q4_K, Q5_K, Q6_K), in `lorax.quantized.Quantized` leaves with the
        same weights; embeddings are decoded, since their rows are looked up. If layers
        of a stack differ in type, all its codes get eight bits; with `scan=False` each
        layer keeps its own. Rules, as for `hf.load`, quantise the weights anew. None:
        nothing is quantised.
      shardings: as for `hf.load`.
      dtype: of the computation, and of decoded weights. None: float32, or the file's
        own type if most of it is F16 or BF16.
      **switches: fields of `llama.Config` that the file does not have, such as `scan`
        and `remat`.

    Returns:
      The Flax module, with its `config`, and its parameters.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged; an architecture, key or type is not implemented;
        tensors are missing, left over, misshapen or not finite; or `lorax.quantize`
        would refuse the rules.

    Example:
      >>> load("model.gguf")
      Traceback (most recent call last):
      ...
      FileNotFoundError: there is no file model.gguf
    """
    head = header.read(pathlib.Path(path))
    own = _dtype(head) if dtype is None else np.dtype(dtype)
    config = metadata.config(head, dtype=own, param_dtype=own, **switches)
    model = llama.Model(config)
    shapes = tree.flatten(hf.abstract(model))
    found = placed(head, config, shapes)
    packs: dict[str, Any] = {}
    if quantize == FILE:
        packs |= plans(found, shapes, config.param_dtype)
    elif quantize is not None:
        tokens = jnp.zeros((1, 1), jnp.int32)
        chosen = packed.chosen(model, hf.abstract(model), quantize, (tokens,))
        packs |= packed.plans(chosen, found)
    nested = flax.traverse_util.unflatten_dict
    if callable(shardings):
        abstract = {name: plan.abstract for name, plan in packs.items()}
        shardings = shardings(model, nested(shapes | abstract, sep="/"))
    lies = {} if shardings is None else tree.flatten(shardings)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: dict[str, Any] = {}
    for name, parts in found.items():
        where = lies.get(name, default)
        if name in packs:
            params[name] = packs[name].read(where)
        else:
            params[name] = leaves.read(parts, shapes[name].shape, where)
    return model, nested(params, sep="/")


def names(config: llama.Config) -> dict[str, str]:
    """Returns the GGUF name of every tensor of a checkpoint."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.layers)  # the widest
    found = {}
    for key in table.locate(llama.entries(config), config.stacks, config.scan):
        name = known.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        found[key] = name
    return found


def heads_of(config: llama.Config, name: str) -> int:
    """Returns the number of heads if a tensor's rows are in llama.cpp's order, or 0."""
    if config.model_type not in TURNED:
        return 0
    if ".attn_q." in name:
        return config.heads
    return config.kv_heads if ".attn_k." in name else 0


def placed(
    head: Header, config: llama.Config, shapes: Mapping[str, Any]
) -> dict[str, list[Part]]:
    """Returns the tensors of every leaf, one for each layer of a stack.

    Raises:
      ValueError: tensors are missing, left over, misshapen or of an unsupported type.
    """
    kind = metadata.architecture(head)
    spelled = names(config)
    where = {
        spelled[key]: location
        for key, location in table.locate(
            llama.entries(config), config.stacks, config.scan
        ).items()
    }
    missing = sorted(set(where) - set(head.tensors))
    extra = sorted(set(head.tensors) - set(where) - {"rope_freqs.weight"})
    if missing or extra:
        raise ValueError(
            f"{head.path}: the tensors do not match its metadata; "
            f"missing: {untrusted.some(missing)}; left over: {untrusted.some(extra)}"
        )
    found: dict[str, list[Part]] = {}
    for name, place in where.items():
        heads = heads_of(config, name)
        tensor = Tensor.of(head.tensors[name], config.param_dtype, heads)
        need = table.disk_shape(place.own(shapes[place.path].shape), place.entry)
        if tensor.shape != need:
            raise ValueError(metadata.misshapen(head, name, tensor.shape, need, kind))
        found.setdefault(place.path, []).append((tensor, place))
    return found


def _dtype(head: Header) -> np.dtype:
    """The dtype that accounts for most bytes; codes count as float32."""
    count: dict[Any, int] = {}
    for tensor in head.tensors.values():
        dtype = header.FLOATS.get(tensor.kind, np.dtype(np.float32))
        count[dtype] = count.get(dtype, 0) + tensor.raw.nbytes
    return max(count, key=lambda dtype: count[dtype], default=np.dtype(np.float32))
