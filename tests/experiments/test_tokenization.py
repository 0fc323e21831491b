"""Tokenizers: bytes by hand, `tokenizer.json` as transformers reads it, bad files."""

import json

import pytest

from experiments.data import tokenization
from experiments.data.sources import paths
from tests.experiments import toy_tokenizers

pytest.importorskip("tokenizers", reason="needs the interop extra: tokenizers")

TEXTS = ["the cat", "", " é\n\n<|im_end|> 😀", "<s>the</s>", "  two  spaces "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_tokenizers.write(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenization.load(folder)


def test_bytes():
    tokenizer = tokenization.load("bytes")
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.encode_spans("aé!")[1] == [(0, 1), (1, 2), (1, 2), (2, 3)]
    assert tokenizer.encode_classified("a") == [256, 97, 257]
    assert tokenizer.encode_classified("a", "b") == [256, 97, 257, 98, 257]
    assert tokenizer.decode([256, 97, 195, 169, 257, 258]) == "aé"
    assert tokenizer.decode([195, 97]) == "�a"


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_added_and_spans_tile_the_text(tokenizer, text):
    ids, spans = tokenizer.encode_spans(text)
    assert ids == tokenizer.encode(text)
    assert len(ids) == len(spans)
    assert {i for begin, end in spans for i in range(begin, end)} == set(
        range(len(text))
    )


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 6, None)
    assert tokenizer.vocabulary == 330
    assert tokenizer.encode("<s></s>") == [0, 6]
    assert tokenizer.encode_classified("the", "cat")[0] == 0
    assert tokenizer.decode([0, *tokenizer.encode("the cat"), 6]) == "the cat"


def test_a_bos_token_that_opens_nothing_is_not_used(tmp_path):
    like_gpt2 = toy_tokenizers.write(tmp_path / "a", opens=False)
    assert tokenization.load(like_gpt2).bos_id is None
    forced = toy_tokenizers.write(tmp_path / "b", opens=False, add_bos_token=True)
    assert tokenization.load(forced).bos_id == 0


def test_padding_is_the_pad_token_or_any_other(tmp_path, tokenizer):
    assert tokenization.padding_id(tokenizer) == tokenizer.eos_id
    assert tokenization.padding_id(tokenization.ByteTokenizer()) == 258
    padded = toy_tokenizers.write(tmp_path, pad_token="<|eot|>", eos_token=None)
    assert tokenization.padding_id(tokenization.load(padded)) == 3


def test_truncation_and_padding_in_the_file_are_not_ours(tmp_path):
    import tokenizers

    folder = toy_tokenizers.write(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(2)
    saved.enable_padding(length=9)
    saved.save(str(folder / "tokenizer.json"))
    tokenizer = tokenization.load(folder)
    assert tokenizer.decode(tokenizer.encode("hello to the assistant")) == (
        "hello to the assistant"
    )


def test_the_map_of_special_tokens_counts_and_the_config_comes_last(tmp_path):
    folder = toy_tokenizers.write(tmp_path, eos_token="<|im_end|>")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>", "pad_token": {"content": "<|eot|>"}})
    )
    tokenizer = tokenization.load(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 3)
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(folder, tokenizer, text):
    transformers = pytest.importorskip("transformers", reason="needs the golden extra")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert tokenizer.encode_classified(text) == theirs.encode(text)


@pytest.mark.once
def test_the_unigram_pieces_of_deberta(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the golden extra")
    folder = toy_tokenizers.write_unigram(tmp_path)
    tokenizer = tokenization.load(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    first, second = "the cat sat on  the moon", "It is four."
    for pair in ((first,), (first, second)):
        assert tokenizer.encode_classified(*pair) == theirs(*pair)["input_ids"]
    ids = tokenizer.encode(first)
    assert ids == theirs.encode(first, add_special_tokens=False)
    assert tokenizer.decode(ids) == "the cat sat on the moon"
    assert (tokenizer.pad_id, tokenizer.vocabulary) == (0, len(theirs))


def test_the_real_tokenizer():
    folder = paths.root() / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set {paths.VARIABLE}")
    tokenizer = tokenization.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocabulary) == (1, 2, 512)
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    assert tokenizer.decode([1, 403, 407, 261, 378, 2]) == "Once upon a time"


def test_only_a_sentencepiece_model(tmp_path):
    (tmp_path / "tok512.model").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"only .* tok512.model.*python -c .*save"
    ):
        tokenization.load(tmp_path)


def test_nothing_at_all(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match="nothing to make one from.*config.json"
    ):
        tokenization.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        tokenization.load(tmp_path / "elsewhere")


def test_damaged_files_are_named(tmp_path):
    folder = toy_tokenizers.write(tmp_path)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"tokenizer_config.json: holds list, not an object"
    ):
        tokenization.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: Expecting prop"):
        tokenization.load(folder)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": "false"}')
    with pytest.raises(ValueError, match="add_bos_token='false'; it must be true or"):
        tokenization.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizers file"):
        tokenization.load(folder)


def test_a_special_token_outside_of_the_vocabulary(tmp_path):
    folder = toy_tokenizers.write(tmp_path, pad_token="<pad>")
    with pytest.raises(
        ValueError,
        match=r"tokenizer_config.json: `pad_token` is '<pad>', .*tokenizer.json",
    ):
        tokenization.load(folder)


def test_a_tokenizer_that_does_not_match_the_model(tokenizer):
    tokenization.require_vocabulary(tokenizer, 384, "base/config.json")
    with pytest.raises(
        ValueError,
        match=r"tokenizer.json has ids up to 329, but `vocab_size` in base/config.json "
        "is 329",
    ):
        tokenization.require_vocabulary(tokenizer, 329, "base/config.json")
    tokenization.require_ids([0, 328], 329, "a.jsonl:3")
    with pytest.raises(ValueError, match="a.jsonl:3: token 1 is 329, outside"):
        tokenization.require_ids([0, 329], 329, "a.jsonl:3")
