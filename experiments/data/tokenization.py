"""Tokenizers: bytes, a checkpoint directory's `tokenizer.json`, a GGUF file's own.

No tokenizer here ever adds special tokens unasked: `encode` gives the tokens of the
text alone, and what opens and closes a sequence is put there by `examples`, once.
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
    bos_id: int | None  # opens every sequence; None if this tokenizer opens none
    eos_id: int | None  # closes every response
    pad_id: int | None  # fills batches; None if it has no such token
    special_tokens: Mapping[str, str]  # "bos_token" and so on -> its text
    marks: Mapping[str, int]  # texts that are one token wherever they stand -> its id

    def encode(self, text: str) -> list[int]:
        """Ids of the text, nothing added."""

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of the text, and the characters that each stands for."""

    def encode_classified(self, first: str, second: str | None = None) -> list[int]:
        """Ids of a sentence or a pair of them, with the marks the model expects."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens left out."""


class ByteTokenizer:
    """Every byte of UTF-8 is a token; three more open, close and fill.

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
        """Ids of the text, nothing added."""
        return list(text.encode())

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of the text, and the character that each byte is part of."""
        spans = [(i, i + 1) for i, c in enumerate(text) for _ in c.encode()]
        return self.encode(text), spans

    def encode_classified(self, first: str, second: str | None = None) -> list[int]:
        """`bos first eos`, and `second eos` behind it."""
        ids = [256, *self.encode(first), 257]
        return ids if second is None else [*ids, *self.encode(second), 257]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; what is no UTF-8 becomes a replacement character."""
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")


class JsonTokenizer:
    """A `tokenizer.json`, with the special tokens that the files beside it name."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        """Reads the files.

        Args:
          source: directory of a checkpoint, with `tokenizer.json` and, as a rule,
            `tokenizer_config.json` and `special_tokens_map.json`; or a GGUF file, which
            holds what stands in them.

        Raises:
          FileNotFoundError: if there is no `tokenizer.json`; where there is a
            sentencepiece model, the message holds the command that converts it.
          ValueError: if a file cannot be read, or names a token that is not in the
            vocabulary; says which file and which key.
        """
        path = pathlib.Path(source)
        named = str(path if is_gguf(path) else path / "tokenizer.json")
        library = extras.require("tokenizers", "interop", named)
        content, configs = read_files(path)
        try:
            self._tokenizer = library.Tokenizer.from_buffer(content)
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f"{named}: not a tokenizers file: {e}") from e
        # What a training script once set must not cut or fill our texts.
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
        # GPT-2 has a BOS token, but opens no sequence with it: ask, do not guess.
        opened = self._tokenizer.encode("a", add_special_tokens=True).ids
        asked = configs["tokenizer_config.json"].get("add_bos_token")
        where = f"{path / 'tokenizer_config.json'}: add_bos_token"
        untrusted.check(where, asked, untrusted.FLAG | None)
        opens = opened[:1] == [bos_id] if asked is None else asked
        self.bos_id = bos_id if opens else None

    def encode(self, text: str) -> list[int]:
        """Ids of the text, nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of the text, and the characters that each stands for."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)

    def encode_classified(self, first: str, second: str | None = None) -> list[int]:
        """A sentence or a pair, as the file's post-processor marks them."""
        return list(self._tokenizer.encode(first, second, add_special_tokens=True).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens left out."""
        return str(self._tokenizer.decode([int(i) for i in ids]))


def load(name: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a config: "bytes", a checkpoint directory, or a GGUF file."""
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name)


def padding_id(tokenizer: Tokenizer) -> int:
    """The id that fills batches.

    Padding is told apart by its weight 0, never by its id: without a pad token any id
    will do, and where that is EOS, the EOS that ends a response stays in the loss.
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
      config: where that stands, such as "base/config.json".

    Raises:
      ValueError: if the tokenizer has ids that the model lacks.
    """
    if tokenizer.vocabulary > vocab_size:
        raise ValueError(
            f"{tokenizer.name} has ids up to {tokenizer.vocabulary - 1}, but "
            f"`vocab_size` in {config} is {vocab_size}: the model has no embedding for "
            "the last ones. Take the tokenizer that came with the checkpoint."
        )


def require_ids(tokens: Sequence[int], vocab_size: int, where: str) -> None:
    """Checks that all ids are a model's: indexing by others would be silent.

    Raises:
      ValueError: if an id is negative or too large; names the first.
    """
    for i, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{where}: token {i} is {token}, outside of the model's vocabulary of "
                f"{vocab_size}."
            )


SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


def _special_tokens(
    folder: pathlib.Path, configs: Mapping[str, dict[str, Any]], tokenizer: Any
) -> tuple[dict[str, str], dict[str, int]]:
    """The texts and the ids of the special tokens that the files name."""
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
    if texts:  # so that `decode` leaves them out wherever they stand
        tokenizer.add_special_tokens(list(texts.values()))
    return texts, ids


# The last has the last word, as in transformers.
CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")


def is_gguf(source: str | os.PathLike[str]) -> bool:
    """True for the name of a GGUF file."""
    return pathlib.Path(source).suffix == ".gguf"


def read_files(source: pathlib.Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """A tokenizer.json, and the objects in the files of `CONFIGS`.

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
    """The objects in the files of `CONFIGS`; {} stands for a missing file."""
    if is_gguf(source):
        return _configs(_of_gguf(source))
    return {name: read_config(source / name) for name in CONFIGS}


def _of_gguf(path: pathlib.Path) -> Mapping[str, dict[str, Any]]:
    from lorax.interop import gguf  # an extra

    return gguf.tokenizer_files(path)


def _configs(files: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: files.get(name, {}) for name in CONFIGS}


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; {} if the file is missing."""
    if not path.is_file():
        return {}
    try:
        return untrusted.parsed(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _how_to_get(folder: pathlib.Path) -> str:
    """What to do where there is no tokenizer.json."""
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
        f".save_pretrained('{folder}')\"`. If the model was trained behind a BOS "
        'token, see that tokenizer_config.json then says `"add_bos_token": true`.'
    )
