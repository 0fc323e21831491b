"""Labelled sentences: tables by hand, GLUE's layout, and the real small sets."""

import numpy as np
import pytest

from experiments.data import tokenization
from experiments.data.sources import classification, glue, paths
from experiments.data.sources.classification import NUMBERS, Columns
from experiments.tasks.scoring.labels import SCORES
from tests.experiments import toy_tokenizers

BYTES = tokenization.ByteTokenizer()


def real(folder):
    if not (paths.root() / folder).is_dir():
        pytest.skip(f"no {paths.root() / folder}: set {paths.VARIABLE}")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def test_a_table_with_labels_as_they_occur(tmp_path):
    path = write(tmp_path / "a.csv", 'text,kind\n"one, two",b\nthree,a\n')
    data = classification.read(path, Columns("text", label="kind"))
    assert data.labels == ("a", "b")
    assert [row[:3] for row in data.rows] == [("one, two", None, 1), ("three", None, 0)]
    assert classification.counts(data.rows, data.labels) == {"a": 1, "b": 1}


def test_json_lines_with_numbers_as_labels(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"sentence": "x", "label": 1}\n')
    data = classification.read(path, labels=["0", "1"])
    assert data.rows[0][:3] == ("x", None, 1)


def test_malformed_rows(tmp_path):
    path = write(tmp_path / "a.csv", "sentence,label\nx,pos\ny,maybe\n ,pos\n")
    with pytest.warns(UserWarning, match="dropped 2 malformed of 3"):
        data = classification.read(path, labels=["neg", "pos"])
    assert data.malformed == (
        f"{path}:3: 'label' is 'maybe', not one of 'neg', 'pos'",
        f"{path}:4: 'sentence' is empty",
    )


def test_a_number_that_is_none_is_malformed(tmp_path):
    path = write(tmp_path / "a.csv", "sentence,label\nx,2.5\ny,nan\nz,much\n")
    with pytest.warns(UserWarning, match="(?s):3: 'label' is 'nan', not a fin.*'much'"):
        data = classification.read(path, labels=NUMBERS)
    assert [row.label for row in data.rows] == [2.5]
    assert data.labels == ()


# Rows as in GLUE's files, with the label last: (head, row, first, second).
GLUE = {
    "CoLA": ("", "gj04\t1\t\tThe cat.", "The cat.", None, 1),
    "SST-2": ("sentence\tlabel", 'a "fine film\t0', 'a "fine film', None, 0),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t7\t8\tOne.\tTwo.",
        "One.",
        "Two.",
        1,
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "0\t1\t2\tWhy?\tHow?\t0",
        "Why?",
        "How?",
        0,
    ),
    "STS-B": ("index\tsentence1\tsentence2\tscore", "0\tA\tB\t3.800", "A", "B", 3.8),
    "MNLI": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\tA\tB\tneutral\tcontradiction",
        "A",
        "B",
        2,
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\tQ?\tS\tentailment", "Q?", "S", 0),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tA\tB\tnot_entailment",
        "A",
        "B",
        1,
    ),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "0\tA\tB\t1", "A", "B", 1),
}


@pytest.mark.parametrize("task", sorted(glue.TASKS))
def test_glue_layout(tmp_path, task):
    head, row, first, second, label = GLUE[task]
    split = glue.TASKS[task].dev[0]
    text = f"{head}\n{row}\n".removeprefix("\n")
    write(tmp_path / task / f"{split}.tsv", "\ufeff" + text)
    data = glue.load(tmp_path, task, split)
    assert data.rows[0][:3] == (first, second, label)
    assert set(glue.TASKS[task].scores) <= set(SCORES)


def test_unknown_tasks_and_splits(tmp_path):
    with pytest.raises(ValueError, match=r"no task 'SST2': choose from .*'SST-2'"):
        glue.load(tmp_path, "SST2")
    with pytest.raises(ValueError, match=r"no split 'test'.*'dev_mismatched'"):
        glue.load(tmp_path, "MNLI", "test")
    with pytest.raises(FileNotFoundError, match="No data at .*RTE"):
        glue.load(tmp_path, "RTE")
    with pytest.raises(ValueError, match="choose from .'sentence_polarity', 'subj"):
        glue.sentences("polarity")


def test_encoding_cuts_and_keeps_the_last_mark():
    rows = (
        classification.Labelled("abc", None, 1),
        classification.Labelled("abcdef", "gh", 0),
    )
    data = classification.Data(rows, ("no", "yes"))
    with pytest.warns(UserWarning, match="a.csv: cut 1 of 2 examples to 6 tokens"):
        encoded = classification.encode(BYTES, data, 6, "a.csv")
    first, second = encoded.examples
    assert first["tokens"].tolist() == [256, 97, 98, 99, 257]
    assert second["tokens"].tolist() == [256, 97, 98, 99, 100, 257]
    assert (first["label"], first["label"].dtype) == (1, np.int32)
    assert (encoded.truncated, encoded.dropped) == (1, 0)


def test_encoding_uses_the_marks_of_the_tokenizer(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the interop extra: tokenizers")
    tokenizer = tokenization.load(toy_tokenizers.write(tmp_path))
    row = classification.Labelled("the cat", "the mat", 2.5)
    data = classification.Data((row,), NUMBERS)
    (example,) = classification.encode(tokenizer, data, 99, "x").examples
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert example["tokens"].tolist() == [
        *[bos, *tokenizer.encode("the cat")],
        *[eos, *tokenizer.encode("the mat")],
    ]
    assert (example["label"], example["label"].dtype) == (2.5, np.float32)


def test_banking77():
    real("banking77")
    for split, size in (("train", 10003), ("test", 3080)):
        data = glue.banking77(split)
        assert (len(data.rows), len(data.labels), data.malformed) == (size, 77, ())
    assert min(classification.counts(data.rows, data.labels).values()) == 40
    assert data.rows[0].first == "How do I locate my card?"
    assert data.labels[data.rows[0].label] == "card_arrival"


SETS = [("sentence_polarity", 10662), ("subjectivity", 10000)]


@pytest.mark.parametrize(("name", "size"), SETS)
def test_sentence_sets(name, size):
    real({"sentence_polarity": "sentence_polarity_mr"}.get(name, "subjectivity_subj"))
    splits = {split: glue.sentences(name, split) for split in glue.TENTHS}
    texts = {split: {r.first for r in data.rows} for split, data in splits.items()}
    rows = sum(len(data.rows) for data in splits.values())
    assert 0.995 * size < rows == sum(map(len, texts.values())) <= size
    assert len(set().union(*texts.values())) == rows  # no overlap between splits
    for data in splits.values():
        each = classification.counts(data.rows, data.labels).values()
        assert max(each) < 1.02 * min(each)
