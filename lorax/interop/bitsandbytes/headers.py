"""Finds the tensors that together form a matrix quantised by bitsandbytes.

With NF4, `X.weight` comes with `X.weight.absmax`, `.quant_map` and
`.quant_state.bitsandbytes__nf4`, which is JSON in bytes; double quantisation adds
`.nested_absmax` and `.nested_quant_map`. With int8, `X.weight` comes with `X.SCB`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax import untrusted
from lorax.interop import files
from lorax.interop.bitsandbytes.matrices import Coded, Int8, Nf4, is_coded

STATE = ".quant_state.bitsandbytes__"
ENDS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
"""The suffixes of the tensors that accompany 4-bit codes."""
DTYPES = ("float16", "bfloat16", "float32")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_SHAPE = untrusted.listed(untrusted.whole(1), least=2)
FIELDS = {
    "quant_type": untrusted.choice("nf4"),
    "blocksize": untrusted.Rule(f"one of {BLOCKS}", lambda v: v in BLOCKS),
    "dtype": untrusted.choice(*DTYPES),
    "shape": untrusted.Rule("two sizes", lambda v: _SHAPE.fits(v) and len(v) == 2),
}
NESTED = {
    "nested_blocksize": untrusted.whole(1),
    "nested_dtype": untrusted.choice("float32"),
    "nested_offset": untrusted.FINITE,
}


def gathered(
    tensors: Mapping[str, files.Tensor], raw: Mapping[str, Any]
) -> dict[str, files.Tensor | Coded]:
    """Returns a checkpoint's tensors, combining those of one matrix.

    Args:
      tensors: as in the files.
      raw: config.json. Its `quantization_config` says that there are codes; everything
        else is read from the tensors.

    Raises:
      ValueError: the method is not bitsandbytes, or tensors do not fit one another; the
        message names the key.
    """
    found: dict[str, files.Tensor | Coded] = dict(tensors)
    if (told := raw.get("quantization_config")) is None:
        return found
    _require_method(told)
    for key in tensors:
        name, _, kind = key.partition(STATE)
        layer = key.removesuffix(".SCB")
        if kind:
            found[name] = _nf4(tensors, name, kind)
            used = [key, *(name + end for end in ENDS)]
        elif layer != key:
            found[f"{layer}.weight"] = _int8(tensors, layer, raw)
            used = [key, f"{layer}.weight_format"]
        else:
            continue
        for other in used:
            found.pop(other, None)
    _require_codes(found)
    return found


def _require_method(told: Any) -> None:
    """Raises ValueError for quantisation methods other than bitsandbytes."""
    where = "config.json: quantization_config"
    untrusted.check(where, told, untrusted.TABLE)
    method = told.get("quant_method")
    if method is None and (told.get("load_in_4bit") or told.get("load_in_8bit")):
        method = "bitsandbytes"  # files from before 2024 do not name it
    if method != "bitsandbytes":
        raise ValueError(
            f"{where}.quant_method={untrusted.shown(method)} is not supported, only "
            "'bitsandbytes' and 'mxfp4'; load the original model and quantise that, "
            "hf.load(..., quantize='nf4'), or save it dense with transformers "
            "(model.dequantize(), save_pretrained)"
        )


def _nf4(tensors: Mapping[str, files.Tensor], name: str, kind: str) -> Nf4:
    """The matrix `name`, from only the headers and its JSON."""
    stored = tensors[f"{name}{STATE}{kind}"]
    where = f"{stored.path.name}: {stored.key!r}"
    if kind != "nf4":
        raise ValueError(
            f"{where}: codes of {kind} are not supported, only of nf4; load the "
            "original model and quantise that: hf.load(..., quantize='nf4')"
        )
    state = _state(stored, where)
    nested = "nested_blocksize" in state
    ends = ["", *(ENDS if nested else ENDS[:2])]
    parts = {end: _beside(tensors, name + end, stored) for end in ends}
    rows, columns = state["shape"]
    blocks = -(-rows * columns // state["blocksize"])
    _require(parts[".absmax"], np.uint8 if nested else np.float32, blocks, where)
    _require(parts[".quant_map"], np.float32, 16, where)
    if nested:
        above = -(-blocks // state["nested_blocksize"])
        _require(parts[".nested_absmax"], np.float32, above, where)
        _require(parts[".nested_quant_map"], np.float32, 256, where)
    codes = parts[""]
    if 2 * codes.nbytes != rows * columns:
        raise ValueError(
            f"{codes.path.name}: {codes.key!r} has {codes.nbytes} bytes, but {where} "
            f"describes a matrix of {rows} by {columns}, with two codes per byte"
        )
    dtype = jnp.dtype(state["dtype"])
    return Nf4(codes.path, name, (rows, columns), dtype, parts, state)


def _state(stored: files.Tensor, where: str) -> dict[str, Any]:
    """The JSON in a tensor of bytes."""
    if stored.dtype != np.uint8 or stored.nbytes > 10_000:
        raise ValueError(f"{where}: it must be JSON in uint8, at most 10,000 bytes")
    try:
        state = untrusted.parsed(stored.read().tobytes().decode())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    fields = FIELDS | (NESTED if state.keys() & NESTED.keys() else {})
    if odd := sorted(state.keys() - fields.keys()):
        raise ValueError(f"{where}: unknown fields: {', '.join(odd)}")
    for name, rule in fields.items():
        untrusted.field(state, name, rule, where)
    return state


def _int8(
    tensors: Mapping[str, files.Tensor], layer: str, raw: Mapping[str, Any]
) -> Int8:
    """The matrix of a layer, from only the headers."""
    scales = tensors[f"{layer}.SCB"]
    where = f"{scales.path.name}: {scales.key!r}"
    codes = _beside(tensors, f"{layer}.weight", scales)
    form = tensors.get(f"{layer}.weight_format")
    if form is not None and form.read().any():
        raise ValueError(
            f"{form.path.name}: {form.key!r} says that rows are not in order (a layout "
            "for one kind of GPU); save the model again with bitsandbytes 0.43 or "
            "later"
        )
    if codes.dtype != np.int8 or len(codes.shape) != 2:
        raise ValueError(
            f"{codes.path.name}: {codes.key!r} is {codes.dtype} of shape "
            f"{list(codes.shape)}, but with {where} it must be int8 with two axes"
        )
    _require(scales, np.float32, codes.shape[0], where)
    told = raw.get("dtype") or raw.get("torch_dtype") or "float16"
    dtype = untrusted.check("config.json: dtype", told, untrusted.choice(*DTYPES))
    return Int8(codes.path, codes.key, codes.shape, jnp.dtype(dtype), codes, scales)


def _beside(
    tensors: Mapping[str, files.Tensor], key: str, known: files.Tensor
) -> files.Tensor:
    if key not in tensors:
        raise ValueError(f"{known.path.name}: there is {known.key!r}, but no {key!r}")
    return tensors[key]


def _require(tensor: files.Tensor, dtype: Any, size: int, where: str) -> None:
    """Raises ValueError unless a tensor has so many values of this dtype."""
    if tensor.dtype != dtype or math.prod(tensor.shape) != size:
        raise ValueError(
            f"{tensor.path.name}: {tensor.key!r} is {tensor.dtype} of shape "
            f"{list(tensor.shape)}, but by {where} it must be {size} values of "
            f"{jnp.dtype(dtype)}"
        )


def _require_codes(found: Mapping[str, Any]) -> None:
    """Raises ValueError for codes without scales, or a checkpoint without codes."""
    for key, tensor in found.items():
        if not is_coded(tensor) and np.issubdtype(tensor.dtype, np.integer):
            if key.endswith(".weight"):
                raise ValueError(
                    f"{tensor.path.name}: {key!r} has dtype {tensor.dtype}, but its "
                    f"scales are missing: the checkpoint has neither {key}{STATE}nf4 "
                    f"nor {key.removesuffix('weight')}SCB"
                )
    if not any(map(is_coded, found.values())):
        raise ValueError(
            "config.json: quantization_config says that bitsandbytes quantised the "
            "model, but no tensor is quantised; remove the field"
        )
