"""What `lorax describe` says about a model without reading its weights."""

import json

import pytest

import lorax
from experiments.planning import outline
from tests.interop import gguf_files

pytestmark = pytest.mark.once

# one layer of width 8, two heads, 12 words; counted by hand below
FIELDS = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
KERNELS = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q, k and v, o, the MLP's three
REST = 2 * 12 * 8 + 3 * 8  # embedding, head; norms
RANK_2 = 2 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return str(tmp_path)  # a checkpoint without tensors


def test_counts_and_bytes(checkpoint):
    found = outline.make(outline.read(checkpoint), [lorax.Target("all-linear", rank=2)])
    assert (found.kind, found.parameters) == ("llama", KERNELS + REST)
    assert found.found.parameters == RANK_2 and len(found.found.left_out) == 2
    assert found.nbytes == {
        "base": 2 * (KERNELS + REST),  # bfloat16
        "adapters": 4 * RANK_2,  # float32
        "their gradient": 4 * RANK_2,
        "AdamW's state": 8 * RANK_2 + 4,  # two moments, and a step
    }
    told = outline.render(found)
    assert f"{RANK_2:,} parameters train in 7 leaves; 2 matrices are left out" in told
    assert "an embedding: its rows are looked up" in told


def test_a_quantised_base_is_smaller(checkpoint):
    model, targets = outline.read(checkpoint), [lorax.Target(".*/q/kernel")]
    dense, packed = (outline.make(model, targets, q) for q in ("", ".*/down.*=int8"))
    codes = 8 * 16 * (2 - 1)  # one byte per weight instead of two
    left = dense.nbytes["base"] - packed.nbytes["base"]
    assert 0 < left < codes  # scales take part of what is saved


def test_a_head_is_drawn_for_labels_and_a_gguf_file_is_read_by_its_header(tmp_path):
    theirs = {"num_key_value_heads", "tie_word_embeddings"}
    bert = {name: FIELDS[name] for name in FIELDS.keys() - theirs}
    bert |= {"model_type": "bert", "max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps(bert))
    found = outline.make(outline.read(str(tmp_path), 5), [lorax.Target("all-linear")])
    heads = [leaf for leaf in found.found if leaf.path.startswith("classifier_out")]
    assert heads[0].shape == (8, 5)
    file = gguf_files.tiny(tmp_path / "tiny.gguf")
    assert outline.read(str(file)).config.vocabulary == gguf_files.VOCABULARY


def test_a_checkpoint_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="./nothing does not exist"):
        outline.read("./nothing")
