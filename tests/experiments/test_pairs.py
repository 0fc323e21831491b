"""Sentence pairs: reading, the loss by its formula, and a run that learns."""

import json

import jax
import numpy as np
import pytest

from configs import minilm_banking_lora
from experiments.data import tokenization
from experiments.data.sources import classification, sentence_pairs
from experiments.data.sources.sentence_pairs import Pair
from experiments.generation import loading
from experiments.recipes import finetune
from experiments.tasks import contrast
from lorax import losses
from lorax.interop import hf, sources

SPLITS = ("train", "valid")


def runlocal():
    return minilm_banking_lora.get_config("runlocal").unlock()


def in_numpy(anchors, positives, scale, groups, symmetric):
    """The loss, row by row."""
    scores = scale * anchors @ positives.T

    def one(scores, i):
        kept = [j for j in range(len(groups)) if j == i or groups[j] != groups[i]]
        return np.log(np.exp(scores[i, kept]).sum()) - scores[i, i]

    ways = (scores, scores.T) if symmetric else (scores,)
    return np.array(
        [np.mean([one(way, i) for way in ways]) for i in range(len(groups))]
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("groups", [range(6), [0, 1, 0, 2, 2, 2]])
def test_the_loss_is_its_formula(symmetric, groups):
    rng = np.random.default_rng(0)
    anchors, positives = rng.normal(size=(2, 6, 4))
    groups = np.array(groups)
    want = in_numpy(anchors, positives, 3.0, groups, symmetric)
    found = losses.in_batch_negatives(
        np.float32(anchors),
        np.float32(positives),
        scale=3.0,
        groups=groups,
        symmetric=symmetric,
    )
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_the_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3\) and positives \(3, 3\)"):
        losses.in_batch_negatives(np.ones((2, 3)), np.ones((3, 3)))


def test_tables_and_groups(tmp_path):
    rows = [("a", "b"), ("c", "d"), ("b", "e"), ("f", "d"), ("g", "h"), ("", "x")]
    lines = [json.dumps({"anchor": a, "positive": p}) for a, p in rows]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match="'anchor' is empty"):
        pairs = sentence_pairs.read(tmp_path / "x.jsonl")
    assert [p[:2] for p in pairs] == rows[:5]
    groups = [p.group for p in pairs]
    assert groups[0] == groups[2] and groups[1] == groups[3]
    assert len(set(groups)) == 3


def test_sentences_of_one_label():
    labelled = [("a", 0), ("b", 1), ("c", 0), ("d", 0), ("e", 2), ("f", 1)]
    data = classification.Data(
        tuple(classification.Labelled(t, None, n) for t, n in labelled), ("x", "y", "z")
    )
    want = [("a", "c", 0), ("b", "f", 1)]
    assert sentence_pairs.of_labels(data) == [Pair(*row) for row in want]
    with pytest.raises(ValueError, match="numbers do not make groups"):
        sentence_pairs.of_labels(data._replace(labels=()))


def test_rows_and_truncation():
    tokenizer = tokenization.ByteTokenizer()
    pairs = [Pair("abc", "abcdefghijkl", 4), Pair("a", "b", 5)]
    found = sentence_pairs.encode(tokenizer, pairs, 8)
    assert found.truncated == 1
    row = sentence_pairs.collate(found.examples[0], 8, 0)
    assert row["real"].sum(1).tolist() == [len(found.examples[0]["anchor"]), 8]
    whole = tokenizer.encode_classified("abcdefghijkl", None)
    assert row["tokens"][1].tolist() == [*whole[:7], whole[-1]]
    assert row["groups"] == 4


def test_retrieval():
    eye = np.eye(4)
    positives = eye[[1, 0, 2, 3]] + 0.5 * eye  # row 0 finds 1 first, then itself
    found = contrast.retrieval(eye, positives, np.array([0, 1, 2, 3]))
    assert found == {"valid_recall_1": 0.5, "valid_recall_5": 1, "valid_mrr": 0.75}
    found = contrast.retrieval(eye, positives, np.array([0, 0, 2, 3]))
    assert found["valid_recall_1"] == 1


@pytest.mark.once
def test_a_run_learns(tmp_path):
    rng = np.random.default_rng(0)
    words = ["red", "blue", "green", "loud", "soft", "quick", "late", "warm"]
    for split, count in zip(SPLITS, (96, 32), strict=True):
        made = []
        for _ in range(count):
            word, noise = rng.choice(words), rng.integers(1000, size=2)
            made.append(
                {"anchor": f"{noise[0]} {word}", "positive": f"{word} {noise[1]}"}
            )
        lines = "\n".join(map(json.dumps, made))
        (tmp_path / f"{split}.jsonl").write_text(lines)
    config = runlocal()
    config.data.train, config.data.valid = (f"{tmp_path}/{s}.jsonl" for s in SPLITS)
    config.data.lengths, config.run.steps, config.eval.every = (32,), 60, 60
    scores = finetune.run(config, str(tmp_path / "run"))
    assert scores["note"] == finetune.RANDOM
    assert scores["base_valid_mrr"] + 0.02 < scores["valid_mrr"] <= 1


def test_what_a_task_asks_of_the_model(tmp_path):
    config = runlocal()
    model, _, _ = loading.load_base(config.model, jax.random.key(0))
    assert model.config.head == "none"
    config.model.random.architectures = ["BertForMaskedLM"]
    masked, _, _ = loading.load_base(config.model, jax.random.key(0))
    with pytest.raises(ValueError, match="has the head 'mlm'.*give 'none'"):
        contrast.make_embed(masked, contrast.pooling_of(config))
    config.model.head = "none"
    assert loading.load_base(config.model, jax.random.key(0))[0] == model
    config.model.random = {}
    config.model.source = str(tmp_path)
    with pytest.raises(ValueError, match="no modules.json.*give one, such as 'mean'"):
        contrast.pooling_of(config)


def test_folders_of_packages():
    assert (hf.locate("package:lorax/models") / "layers.py").exists()
    with pytest.raises(FileNotFoundError, match="'lorax' has no folder 'model'"):
        hf.locate("package:lorax/model")
    with pytest.raises(FileNotFoundError, match="'gt_none' is not installed here"):
        hf.locate("package:gt_none/model")
    assert sources.in_package("package:lorax/py.typed", file=True).is_file()
    with pytest.raises(FileNotFoundError, match="'lorax' has no file 'x.gguf'"):
        loading.find("package:lorax/x.gguf")
