"""Tokenizers in GGUF files: both kinds, by hand and on real ones."""

import json
import struct

import numpy as np
import pytest
import tokenizers

from experiments.data import tokenization
from experiments.data.chat import templates
from experiments.generation import loading
from lorax.interop import gguf, hf
from tests.data_paths import DATA, needs_data
from tests.interop import gguf_files as made

pytestmark = pytest.mark.once

TOKENS = [*made.LETTERS, "11", "111", "ab", "xyz", "Ã©", "Ġ=", "<s>", "</s>", "<call>"]
MERGES = ["1 1", "11 1", "a b", "Ã ©", "Ġ ="]
KINDS = [1] * (len(TOKENS) - 3) + [3, 3, 4]


def written(path, **fields):
    """A file with only a tokenizer; None omits a key."""
    told = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": TOKENS,
        "token_type": KINDS,
        "merges": MERGES,
        "bos_token_id": len(TOKENS) - 3,
        "eos_token_id": len(TOKENS) - 2,
    }
    told |= fields
    keys = {f"tokenizer.ggml.{key}": value for key, value in told.items()}
    template = keys.pop("tokenizer.ggml.chat_template", None)
    return made.write(path, {}, metadata=keys | {"tokenizer.chat_template": template})


def pieces(path, text):
    whole = gguf.tokenizer_files(path)["tokenizer.json"]
    made = tokenizers.Tokenizer.from_str(json.dumps(whole))
    encoded = made.encode(text, add_special_tokens=False)
    assert made.decode(encoded.ids, skip_special_tokens=False) == text
    return encoded.tokens


@pytest.mark.parametrize(
    ("pre", "text", "want"),
    [
        ("gpt-2", "1111ab", ["11", "11", "ab"]),  # a number is a word
        ("smollm", "1111ab", ["1", "1", "1", "1", "ab"]),  # a digit
        ("llama-bpe", "1111ab", ["111", "1", "ab"]),  # three digits
        ("gpt-2", "11111", ["11", "111"]),
        ("llama-bpe", "11111", ["111", "11"]),
        ("llama-bpe", "121111", ["1", "2", "1", "111"]),
        ("gpt-2", "121111", ["1", "2", "11", "11"]),
        ("qwen2", "1111ab", ["1", "1", "1", "1", "ab"]),
        ("gpt-2", "xyz", ["x", "y", "z"]),
        ("llama-bpe", "xyz", ["xyz"]),  # a token without merges
        ("gpt-2", "a =<call>é", ["a", "Ġ=", "<call>", "Ã©"]),
        ("smollm", "a<s>\n", ["a", "<s>", "Ċ"]),
    ],
)
def test_words_are_cut_as_their_name_says(tmp_path, pre, text, want):
    assert pieces(written(tmp_path / "x.gguf", pre=pre), text) == want


def test_qwen2_composes_letters(tmp_path):
    path = written(tmp_path / "x.gguf", pre="qwen2")
    tokenizer = tokenization.load(path)
    assert tokenizer.encode("e\u0301") == [TOKENS.index("Ã©")]


def test_the_tokenizer_of_the_programs(tmp_path):
    template = "{% for m in messages %}{{ bos_token + m['content'] }}{% endfor %}"
    fields = {"add_bos_token": True, "padding_token_id": 0, "chat_template": template}
    path = written(tmp_path / "x.gguf", **fields)
    tokenizer = tokenization.load(path)
    count = len(TOKENS)
    assert tokenizer.vocabulary == count and tokenizer.pad_id == 0
    assert (tokenizer.bos_id, tokenizer.eos_id) == (count - 3, count - 2)
    assert tokenizer.special_tokens["eos_token"] == "</s>"
    assert tokenizer.marks["<call>"] == count - 1
    assert tokenizer.encode_classified("ab") == [count - 3, TOKENS.index("ab")]
    assert tokenizer.decode([count - 3, TOKENS.index("ab"), count - 2]) == "ab"
    chat = templates.load(path, tokenizer)
    assert chat.render([{"role": "user", "content": "ab"}]).text == "<s>ab"
    closed = tokenization.load(written(tmp_path / "y.gguf"))
    assert closed.bos_id is None
    llama3 = tokenization.load(written(tmp_path / "z.gguf", pre="llama-bpe"))
    assert llama3.bos_id == count - 3
    with pytest.raises(templates.ChatTemplateError, match="y.gguf has no chat"):
        templates.load(tmp_path / "y.gguf", closed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "there is no 'tokenizer.ggml.model' in the metadata"),
        ({"model": "bert"}, "tokenizer.ggml.model='bert'; it must be one of 'gpt2', "),
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken' is not implemented; supp"),
        ({"tokens": None}, "there is no 'tokenizer.ggml.tokens'"),
        (
            {"tokens": [1, 2]},
            r"tokens=\[1, 2\]; it must be a list of 1 or more, each t",
        ),
        (
            {"tokens": [*TOKENS[:-1], "ab"]},
            "tokenizer.ggml.tokens: 'ab' appears twice",
        ),
        ({"token_type": [1]}, f"token_type has 1 values for {len(TOKENS)} tokens"),
        ({"merges": None}, "there is no 'tokenizer.ggml.merges'"),
        ({"merges": ["a b", "a q"]}, r"merges\[1\]='a q' is not a pair of tokens that"),
        ({"merges": ["a"]}, r"merges\[0\]='a' is not a pair of tokens"),
        ({"bos_token_id": 10**6}, "bos_token_id=1000000; it must be an int >= 0"),
        (
            {"bos_token_id": None, "add_bos_token": True},
            "there is no tokenizer.ggml.bo",
        ),
        ({"model": "llama", "scores": [0.5]}, "scores has 1 values for"),
        (
            {"model": "llama", "scores": [float("nan")] * len(TOKENS)},
            "scores=.*it must be a list, each a number",
        ),
        (
            {"model": "llama", "tokens": [*TOKENS[:-1], "x" * 300]},
            f"tokens.{len(TOKENS) - 1}. has 300 characters; at most 256",
        ),
    ],
)
def test_what_is_not_a_tokenizer_is_said(tmp_path, fields, message):
    with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
        gguf.tokenizer_files(written(tmp_path / "x.gguf", **fields))


def by_scores(text, scores):
    """SentencePiece's BPE: repeatedly joins the best pair that forms a token."""
    left = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [
            (scores[one + two], -i)
            for i, (one, two) in enumerate(zip(left, left[1:]))
            if one + two in scores
        ]
        if not joins:
            break
        i = -max(joins)[1]
        left[i : i + 2] = [left[i] + left[i + 1]]
    bytes_of = lambda piece: [f"<0x{b:02X}>" for b in piece.encode()]
    return [
        p for piece in left for p in ([piece] if piece in scores else bytes_of(piece))
    ]


def sentencepiece_model(path):
    """`(piece, score, kind)` from a .model file: protobuf, parsed by hand."""
    raw, at, found = path.read_bytes(), 0, []
    while at < len(raw) and raw[at] == 0x0A:  # field 1, a message
        size, at = raw[at + 1], at + 2
        assert size < 128
        piece, score, kind, end = "", 0.0, 1, at + size
        while at < end:
            field, at = raw[at], at + 1
            if field == 0x0A:
                piece = raw[at + 1 : at + 1 + raw[at]].decode()
                at += 1 + raw[at]
            elif field == 0x15:
                (score,) = struct.unpack("<f", raw[at : at + 4])
                at += 4
            else:
                assert field == 0x18
                kind, at = raw[at], at + 1
        found.append((piece, score, kind))
    return found


STORIES = DATA / "stories260k"


def stories_file(path):
    """The real stories model, as llama.cpp's converter writes it, in float32."""
    model, params = hf.load(STORIES, scan=False)
    held = {}
    for key, rows in hf.to_disk(model.config, params).items():
        name = key.removeprefix("model.")
        name = "output_norm.weight" if name == "norm.weight" else name
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        for own, heads in {"_q.": 8, "_k.": 4}.items():
            if own in name:  # the inverse of by_halves
                order = made.by_halves(np.arange(len(rows)), heads)
                rows = rows[np.argsort(order)]
        held[name] = None, np.ascontiguousarray(rows, np.float32)
    table = sentencepiece_model(STORIES / "tok512.model")
    config = model.config
    told = {
        "general.name": "stories260K",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in table],
        "tokenizer.ggml.scores": [score for _, score, _ in table],
        "tokenizer.ggml.token_type": [kind for _, _, kind in table],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    sizes = {
        "context_length": config.positions,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
    }
    return made.write(path, held, metadata=told, **sizes)


RENAMED = {
    "embed_tokens": "token_embd",
    "layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@needs_data
def test_a_real_sentencepiece_tokenizer_and_its_model(tmp_path):
    path = stories_file(tmp_path / "stories.gguf")
    model, params, tokenizer = loading.load_model(str(path))
    _, want, theirs = loading.load_model("stories260k")
    for name in ("q", "k", "o", "up"):
        np.testing.assert_array_equal(
            params["layers"][name]["kernel"], want["layers"][name]["kernel"]
        )
    table = sentencepiece_model(STORIES / "tok512.model")
    scores = {piece: score for piece, score, _ in table}
    places = {piece: i for i, (piece, _, _) in enumerate(table)}
    story = (STORIES / "stories260K.md").read_text().split("```")[1][:2_000]
    for text in [*story.split("\n"), "Zoë  paid 3€!", "  two spaces", "日本"]:
        ids = tokenizer.encode(text)
        assert ids == [places[piece] for piece in by_scores(text, scores)] or not text
        assert tokenizer.decode(ids) == text
        short = " ".join(text.split())  # as this model's own tokenizer does
        assert tokenizer.encode(short) == theirs.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
