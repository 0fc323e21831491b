"""Tokenizers: bytes, a checkpoint directory's `tokenizer.json`, a GGUF file's own.

No tokenizer here adds special tokens unasked: `encode` returns only the tokens of the
text, and `examples` adds what opens and closes a sequence, once.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from experiments.data import extras
from lorax import untrusted

Span = tuple[int, int]  # characters [begin, end) of the text


class Tokenizer(Protocol):
    """What the data sets need to know of a tokenizer."""

    name: str  # where it comes from, for messages
    vocabulary: int  # ids are 0 .. vocabulary - 1
    bos_id: int | None  # opens every sequence; None if sequences have no BOS
    eos_id: int | None  # closes every response
    pad_id: int | None  # pads batches; None if it has no such token
    special_tokens: Mapping[str, str]  # "bos_token" and so on -> its text
    marks: Mapping[str, int]  # texts that are always a single token -> its id

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, with nothing added."""

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Returns the ids of the text, and the characters that each stands for."""

    def encode_classified(self, first: str, second: str | None = None) -> list[int]:
        """Returns a sentence's or a pair's ids, with the special tokens expected."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, without special tokens."""


class ByteTokenizer:
    """Every UTF-8 byte is a token; three more are BOS, EOS and padding.

    Example:
      >>> tokenizer = ByteTokenizer()
      >>> tokenizer.encode("é!")
      [195, 169, 33]
      >>> tokenizer.decode([tokenizer.bos_id, 195, 169, 33])
      'é!'
    """

    name: str = "bytes"
    vocabulary: int = 259
    bos_id: int | None = 256
    eos_id: int | None = 257
    pad_id: int | None = 258
    # For chat templates: the three have no text.
    special_tokens: Mapping[str, str] = {"bos_token": "", "eos_token": ""}
    marks: Mapping[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, with nothing added."""
        return list(text.encode())

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Returns the ids of the text, and the character that each byte is part of."""
        spans = [(i, i + 1) for i, c in enumerate(text) for _ in c.encode()]
        return self.encode(text), spans

    def encode_classified(self, first: str, second: str | None = None) -> list[int]:
        """Returns `bos first eos`, followed by `second eos` for a pair."""
        ids = [256, *self.encode(first), 257]
        return ids if second is None else [*ids, *self.encode(second), 257]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the bytes, with replacement characters where invalid."""
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")


class JsonTokenizer:
    """A `tokenizer.json`, with the special tokens named by the files beside it."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        """Reads the files.

        Args:
          source: directory of a checkpoint, with `tokenizer.json` and usually
            `tokenizer_config.json` and `special_tokens_map.json`; or a GGUF file, which
            holds their content.

        Raises:
          FileNotFoundError: there is no `tokenizer.json`; if there is a sentencepiece
            model, the message has the command that converts it.
          ValueError: a file cannot be read, or names a token that is not in the
            vocabulary; the message names the file and the key.
        """
        path = pathlib.Path(source)
        named = str(path if is_gguf(path) else path / "tokenizer.json")
        library = extras.require("tokenizers", "interop", named)
        content, configs = read_files(path)
        try:
            self._tokenizer = library.Tokenizer.from_buffer(content)
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{named}: not a tokenizers file: {e}") from e
        # Truncation and padding that a training script once set must not apply here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = named
        self.vocabulary = 1 + max(self._tokenizer.get_vocab(True).values(), default=-1)
        self.special_tokens: Mapping[str, str]
        self.special_tokens, ids = _special_tokens(path, configs, self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self.marks: Mapping[str, int] = {t.content: i for i, t in added.items()}
        self.eos_id = ids.get("eos_token")
        self.pad_id = ids.get("pad_token")
        bos_id = ids.get("bos_token")
        # GPT-2 has a BOS token, but no sequence begins with it: ask, do not guess.
        opened = self._tokenizer.encode("a", add_special_tokens=True).ids
        asked = configs["tokenizer_config.json"].get("add_bos_token")
        where = f"{path / 'tokenizer_config.json'}: add_bos_token"
        untrusted.check(where, asked, untrusted.FLAG | None)
        opens = opened[:1] == [bos_id] if asked is None else asked
        self.bos_id = bos_id if opens else None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the text, with nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Returns the ids of the text, and the characters that each stands for."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)

    def encode_classified(self, first: str, second: str | None = None) -> list[int]:
        """Returns the ids of a sentence or a pair, from the file's post-processor."""
        return list(self._tokenizer.encode(first, second, add_special_tokens=True).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids, without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids]))


def load(name: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer: "bytes", a checkpoint directory, or a GGUF file."""
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name)


def padding_id(tokenizer: Tokenizer) -> int:
    """Returns the id that pads batches.

    Padding is recognised by its weight 0, never by its id: without a pad token any id
    will do, and if that is EOS, the EOS that ends a response stays in the loss.
    """
    candidates = (tokenizer.pad_id, tokenizer.eos_id, 0)
    return next(i for i in candidates if i is not None)


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int, config: str) -> None:
    """Checks that a model has an embedding for every id.

    A model may have more rows than the tokenizer has ids: many are padded to a
    multiple of 64 or 128.

    Args:
      tokenizer: of the data.
      vocab_size: of the model.
      config: where `vocab_size` comes from, such as "base/config.json".

    Raises:
      ValueError: the tokenizer has ids that the model lacks.
    """
    if tokenizer.vocabulary > vocab_size:
        raise ValueError(
            f"{tokenizer.name} has ids up to {tokenizer.vocabulary - 1}, but "
            f"`vocab_size` in {config} is {vocab_size}: the model has no embedding for "
            "the last ones. Use the tokenizer that came with the checkpoint."
        )


def require_ids(tokens: Sequence[int], vocab_size: int, where: str) -> None:
    """Checks that all ids are a model's, since indexing with others fails silently.

    Raises:
      ValueError: an id is negative or too large; names the first.
    """
    for i, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{where}: token {i} is {token}, outside the model's vocabulary of "
                f"{vocab_size}."
            )


SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


def _special_tokens(
    folder: pathlib.Path, configs: Mapping[str, dict[str, Any]], tokenizer: Any
) -> tuple[dict[str, str], dict[str, int]]:
    """Returns the texts and ids of the special tokens that the files name."""
    texts: dict[str, str] = {}
    ids: dict[str, int] = {}
    for file, values in configs.items():
        for key in SPECIAL:
            value = values.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if text is None:
                continue
            token = tokenizer.token_to_id(text) if isinstance(text, str) else None
            if token is None:
                raise ValueError(
                    f"{folder / file}: `{key}` is {text!r}, which is not in the "
                    f"vocabulary of {folder / 'tokenizer.json'}: the two files belong "
                    "to different tokenizers, or the token was never added."
                )
            texts[key], ids[key] = text, token
    if texts:  # so that `decode` always leaves them out
        tokenizer.add_special_tokens(list(texts.values()))
    return texts, ids


# The last one wins, as in transformers.
CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")


def is_gguf(source: str | os.PathLike[str]) -> bool:
    """Whether the name is that of a GGUF file."""
    return pathlib.Path(source).suffix == ".gguf"


def read_files(source: pathlib.Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """Returns the tokenizer.json, and the objects in the files of `CONFIGS`.

    Args:
      source: a directory, or a GGUF file.
    """
    if is_gguf(source):
        files = _of_gguf(source)
        return json.dumps(files["tokenizer.json"]).encode(), _configs(files)
    path = source / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(_how_to_get(source))
    return path.read_bytes(), read_configs(source)


def read_configs(source: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the objects in the files of `CONFIGS`; {} for a missing file."""
    if is_gguf(source):
        return _configs(_of_gguf(source))
    return {name: read_config(source / name) for name in CONFIGS}


def _of_gguf(path: pathlib.Path) -> Mapping[str, dict[str, Any]]:
    from lorax.interop import gguf  # an extra

    return gguf.tokenizer_files(path)


def _configs(files: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: files.get(name, {}) for name in CONFIGS}


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object; {} if the file is missing."""
    if not path.is_file():
        return {}
    try:
        return untrusted.parsed(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _how_to_get(folder: pathlib.Path) -> str:
    """Says what to do if there is no tokenizer.json."""
    lacks = f"{folder} has no tokenizer.json"
    if not folder.is_dir():
        return f"{lacks}: there is no such directory."
    models = sorted(p.name for p in folder.glob("*.model"))
    if not models:
        return f"{lacks}, and nothing to make one from: {sorted(os.listdir(folder))}"
    return (
        f"{lacks}, only the sentencepiece model {models[0]}. Convert it once, where "
        'transformers and sentencepiece are installed: `python -c "from transformers '
        f"import AutoTokenizer as T; T.from_pretrained('{folder}')"
        f".save_pretrained('{folder}')\"`. If the model was trained with a BOS token "
        'in front, make sure that tokenizer_config.json says `"add_bos_token": true`.'
    )
