"""Examples of prompt and response: what is trained on, decoded, and what is cut."""

import numpy as np
import pytest

from experiments.data import examples, tokenization
from experiments.data.examples import Pair
from tests.experiments import toy_tokenizers

BYTES = tokenization.ByteTokenizer()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="needs the interop extra: tokenizers")
    return tokenization.load(toy_tokenizers.write(tmp_path_factory.mktemp("t")))


def test_by_hand():
    example = examples.encode_pair(BYTES, "q?", "é")
    assert example["tokens"].tolist() == [256, 113, 63, 195, 169, 257]
    assert example["loss_mask"].tolist() == [0, 0, 0, 1, 1, 1]
    assert example["bytes"] == 2  # without EOS
    assert example["tokens"].dtype == np.int32
    assert example["loss_mask"].dtype == np.float32


@pytest.mark.parametrize("prompt", ["the user said", "<s>the user said"])
@pytest.mark.parametrize("response", [" hello", " hello</s>"])
def test_bos_and_eos_are_there_once(tokenizer, prompt, response):
    example = examples.encode_pair(tokenizer, prompt, response)
    tokens = example["tokens"].tolist()
    assert tokens.count(tokenizer.bos_id) == 1 and tokens[0] == tokenizer.bos_id
    assert tokens.count(tokenizer.eos_id) == 1 and tokens[-1] == tokenizer.eos_id
    assert example["loss_mask"][-1] == 1  # EOS is learned
    assert list(examples.trained_text(tokenizer, example)) == [" hello"]


def test_a_prompt_has_the_same_tokens_in_generation(tokenizer):
    example = examples.encode_pair(tokenizer, "What is two ", "plus")
    ids = examples.prompt_ids(tokenizer, "What is two ")
    assert example["tokens"][: len(ids)].tolist() == ids
    assert example["loss_mask"][: len(ids)].sum() == 0


def test_a_tokenizer_without_bos_opens_with_the_text(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the interop extra: tokenizers")
    tokenizer = tokenization.load(toy_tokenizers.write(tmp_path, opens=False))
    assert examples.prompt_ids(tokenizer, "the") == tokenizer.encode("the")


def test_truncation_cuts_counts_and_drops():
    pairs = [Pair("ab", "cd"), Pair("a", "bcdefg"), Pair("abcdef", "g"), Pair("", "a")]
    with pytest.warns(
        UserWarning, match="data: dropped 1 of 4 examples.*max_length=5; 1 more lost"
    ):
        encoded = examples.encode_pairs(BYTES, pairs, 5, "data")
    assert [e["tokens"].tolist() for e in encoded.examples] == [
        [256, 97, 98, 99, 100, 257],  # six tokens make five inputs and five targets
        [256, 97, 98, 99, 100, 101],
        [256, 97, 257],
    ]
    assert (encoded.truncated, encoded.dropped) == (1, 1)
    # four of seven trained tokens are left: 3.43 of six bytes
    assert [int(e["bytes"]) for e in encoded.examples] == [2, 3, 1]


def test_a_response_cut_to_nothing_but_the_first_token_is_dropped():
    # without a BOS, nothing predicts the first token
    example = examples.make([1, 2, 3], [1, 0, 0], "a")
    with pytest.raises(ValueError, match="x: none of 1 examples has a response within"):
        examples.truncate([example], 8, "x")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the interop extra: tokenizers")
    folder = toy_tokenizers.write(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match="no EOS token.*`eos_token` in tokenizer_conf"):
        examples.encode_pair(tokenization.load(folder), "a", "b")
