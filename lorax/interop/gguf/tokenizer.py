"""The tokenizer and chat template of a GGUF file, as the files of a checkpoint.

| tokenizer.ggml.model | what it is |
|---|---|
| gpt2 | byte-level BPE; tokenizer.ggml.pre names the regex that splits words |
| llama | SentencePiece's BPE: joins the pair whose token has the best score |
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import gguf

from lorax import untrusted
from lorax.interop.gguf import header
from lorax.interop.gguf.header import Header

_Kind = gguf.TokenType
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _cut(numbers: str) -> list[dict[str, Any]]:
    """Splits words by the regex of Llama 3 and Qwen2, which differ in numbers."""
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    split["pattern"] = {"Regex": _WORDS % numbers}
    return [split, _BYTES | {"use_regex": False}]


_GPT2 = [_BYTES | {"use_regex": True}]
_DIGITS = [{"type": "Digits", "individual_digits": True}, *_GPT2]
_LLAMA3, _QWEN2 = _cut(r"\p{N}{1,3}"), _cut(r"\p{N}")
CUTS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""How words are split, by the value of tokenizer.ggml.pre."""

SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


LONGEST = 256
"""Most characters of a token in SentencePiece's kind: all its parts are looked up."""


def tokenizer_files(path: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns tokenizer.json and tokenizer_config.json, which has the chat template.

    `tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))` encodes text as
    in the model's training.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged, or its tokenizer is not implemented; the message
        names the key.
    """
    head = header.read(pathlib.Path(path))
    tokens = _field(head, "tokens", untrusted.listed(untrusted.TEXT, 1))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        second = next(i for i, t in enumerate(tokens) if vocabulary[t] != i)
        raise ValueError(
            f"{head.path}: tokenizer.ggml.tokens: {tokens[second]!r} appears twice"
        )
    kinds = _for_each(head, "token_type", untrusted.whole(), tokens, _Kind.NORMAL)
    special = _special(head, tokens)
    model = _field(head, "model", untrusted.choice("gpt2", "llama"))
    made = _byte_level if model == "gpt2" else _sentencepiece
    parts, opens = made(head, vocabulary, special)
    opens = _field(head, "add_bos_token", untrusted.FLAG, opens)
    if opens and "bos_token" not in special:
        raise ValueError(
            f"{head.path}: tokenizer.ggml.add_bos_token=True, but there is no "
            "tokenizer.ggml.bos_token_id"
        )
    first = special.get("bos_token") if opens else None
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(tokens, kinds)),
        "post_processor": None if first is None else _opening(first, vocabulary),
        **parts,
    }
    told = {**special, "add_bos_token": opens, "clean_up_tokenization_spaces": False}
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    template = head.field("tokenizer.chat_template", untrusted.TEXT, "")
    told |= {"chat_template": template} if template else {}
    return {"tokenizer.json": whole, "tokenizer_config.json": told}


def _field(head: Header, key: str, rule: untrusted.Rule, default: Any = None) -> Any:
    return head.field(f"tokenizer.ggml.{key}", rule, default)


def _for_each(
    head: Header, key: str, rule: untrusted.Rule, tokens: list[str], default: Any
) -> list[Any]:
    """A value for every token."""
    found = _field(head, key, untrusted.listed(rule), [default] * len(tokens))
    if len(found) != len(tokens):
        raise ValueError(
            f"{head.path}: tokenizer.ggml.{key} has {len(found)} values for "
            f"{len(tokens)} tokens"
        )
    return found


def _special(head: Header, tokens: list[str]) -> dict[str, str]:
    """The texts of the tokens with special roles."""
    rule = untrusted.whole(0, len(tokens) - 1)
    return {
        name: tokens[_field(head, key, rule)]
        for name, key in SPECIAL.items()
        if f"tokenizer.ggml.{key}" in head.metadata
    }


def _added(tokens: list[str], kinds: list[int]) -> Iterator[dict[str, Any]]:
    """The tokens that are never split, wherever their text occurs."""
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (_Kind.UNKNOWN, _Kind.CONTROL, _Kind.USER_DEFINED):
            plain = dict.fromkeys(
                ("single_word", "lstrip", "rstrip", "normalized"), False
            )
            special = kind != _Kind.USER_DEFINED
            yield {"id": i, "content": token, **plain, "special": special}


def _opening(first: str, vocabulary: dict[str, int]) -> dict[str, Any]:
    """Puts a token in front of a text, and in front of each text of a pair."""

    def opened(name: str, kind: int) -> list[dict[str, Any]]:
        mark = {"SpecialToken": {"id": first, "type_id": kind}}
        return [mark, {"Sequence": {"id": name, "type_id": kind}}]

    known = {"id": first, "ids": [vocabulary[first]], "tokens": [first]}
    return {
        "type": "TemplateProcessing",
        "single": opened("A", 0),
        "pair": [*opened("A", 0), *opened("B", 1)],
        "special_tokens": {first: known},
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **more: Any) -> Any:
    plain = dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    off = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {
        "type": "BPE",
        **plain,
        **off,
        "vocab": vocabulary,
        "merges": merges,
        **more,
    }


def _byte_level(
    head: Header, vocabulary: dict[str, int], special: dict[str, str]
) -> tuple[dict[str, Any], bool]:
    """GPT-2's kind: its parts, and whether texts start with BOS by default."""
    name = _field(head, "pre", untrusted.TEXT, "gpt-2")
    if name not in CUTS:
        raise ValueError(
            f"{head.path}: tokenizer.ggml.pre={untrusted.shown(name)} is not "
            f"implemented; supported are {', '.join(CUTS)}"
        )
    cut = CUTS[name]
    merges = []
    for i, line in enumerate(_field(head, "merges", untrusted.listed(untrusted.TEXT))):
        pair = line.split(" ")
        known = {*pair, "".join(pair)} <= vocabulary.keys()
        if len(pair) != 2 or not known:
            raise ValueError(
                f"{head.path}: tokenizer.ggml.merges[{i}]={untrusted.shown(line)} is "
                "not a pair of tokens that join to a third"
            )
        merges.append(pair)
    parts = {
        "normalizer": {"type": "NFC"} if cut is _QWEN2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut},
        "decoder": _BYTES | {"use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=cut is _LLAMA3),
    }
    return parts, cut is _LLAMA3


def _sentencepiece(
    head: Header, vocabulary: dict[str, int], special: dict[str, str]
) -> tuple[dict[str, Any], bool]:
    """SentencePiece's kind, in which a space is a letter and bytes have tokens."""
    scores = _for_each(head, "scores", untrusted.FINITE, list(vocabulary), 0.0)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    begins = _field(head, "add_space_prefix", untrusted.FLAG, True)
    front = [{"type": "Prepend", "prepend": "▁"}] if begins else []
    back = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if begins else []
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    joined = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *back]
    unknown = {"unk_token": special.get("unk_token"), "fuse_unk": True}
    long = max(vocabulary, key=len)
    if len(long) > LONGEST:
        raise ValueError(
            f"{head.path}: tokenizer.ggml.tokens[{vocabulary[long]}] has {len(long)} "
            f"characters; at most {LONGEST} are supported"
        )
    merges = _merges(vocabulary, scores)
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [*front, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": joined},
        "model": _bpe(vocabulary, merges, byte_fallback=True, **unknown),
    }
    return parts, True


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[list[str]]:
    """All ways to form a token from two others, best scores first."""
    order = sorted(vocabulary, key=lambda token: -scores[vocabulary[token]])
    return [
        [token[:i], token[i:]]
        for token in order
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
