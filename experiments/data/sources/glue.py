"""The GLUE tasks in the layout of their download, and three small sets.

    ROOT/CoLA/train.tsv  ROOT/CoLA/dev.tsv  ROOT/MNLI/dev_matched.tsv  ...

GLUE's test sets have no labels, so scores are reported on `dev`.

References: Wang et al., "GLUE", arXiv:1804.07461. Casanueva et al., "Efficient intent
detection with dual sentence encoders", arXiv:2003.04807 (banking77). Pang and Lee,
ACL 2005 and ACL 2004 (sentence polarity, subjectivity).
"""

import json
import os
import pathlib
from typing import NamedTuple

import ml_collections
import numpy as np

from experiments.data.sources import classification, paths, records
from experiments.data.sources.classification import NUMBERS, Columns, Data, Labelled

SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")


class Task(NamedTuple):
    """One task: its columns, its labels in order, and its scores."""

    columns: Columns
    labels: tuple[str, ...]
    scores: tuple[str, ...]  # of `experiments.tasks.scoring.labels`, the main one first
    header: tuple[str, ...] | None = None  # for files without a header line
    dev: tuple[str, ...] = ("dev",)


# Label orders are those of the hub's `glue`, with which published heads were trained.
TASKS = {
    "CoLA": Task(
        Columns(),
        ("0", "1"),
        ("matthews",),
        header=("source", "label", "mark", "sentence"),
    ),
    "SST-2": Task(Columns(), ("0", "1"), ("accuracy",)),
    "MRPC": Task(
        Columns("#1 String", "#2 String", "Quality"), ("0", "1"), ("f1", "accuracy")
    ),
    "QQP": Task(
        Columns("question1", "question2", "is_duplicate"),
        ("0", "1"),
        ("f1", "accuracy"),
    ),
    "STS-B": Task(Columns(*SENTENCES, "score"), NUMBERS, ("pearson", "spearman")),
    "MNLI": Task(
        Columns(*SENTENCES, "gold_label"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        dev=("dev_matched", "dev_mismatched"),
    ),
    "QNLI": Task(Columns("question", "sentence"), ENTAILMENT, ("accuracy",)),
    "RTE": Task(Columns(*SENTENCES), ENTAILMENT, ("accuracy",)),
    "WNLI": Task(Columns(*SENTENCES), ("0", "1"), ("accuracy",)),
}


def load(root: str | os.PathLike[str], task: str, split: str = "train") -> Data:
    """Loads one split of a GLUE task.

    Args:
      root: the folder with a folder for each task.
      task: a name in `TASKS`.
      split: "train" or one of the task's `dev`.

    Raises:
      ValueError: the task or the split is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"GLUE has no task {task!r}: choose from {sorted(TASKS)}.")
    found = TASKS[task]
    if split not in ("train", *found.dev):
        raise ValueError(
            f"{task} has no split {split!r} with labels: choose from "
            f"{('train', *found.dev)}."
        )
    path = paths.find(pathlib.Path(root, task, f"{split}.tsv"))
    return classification.read(path, found.columns, found.labels, found.header)


def banking77(split: str = "train") -> Data:
    """Loads questions to a bank by intent: 10,003 train, 3,080 test, 77 labels.

    Args:
      split: "train" or "test".
    """
    folder = paths.find("banking77")
    labels = json.loads((folder / "categories.json").read_text("utf-8"))
    path = paths.find(folder / f"{split}.csv")
    return classification.read(path, Columns("text", label="category"), labels)


# Name -> the folder and, in order, the file of each label.
BY_FILE = {
    "sentence_polarity": (
        "sentence_polarity_mr/sentence_polarity.zip/sentence_polarity",
        {"negative": "rt-polarity.neg", "positive": "rt-polarity.pos"},
    ),
    "subjectivity": (
        "subjectivity_subj/subjectivity.zip/subjectivity",
        {"objective": "plot.tok.gt9.5000", "subjective": "quote.tok.gt9.5000"},
    ),
}
# The sets have no split of their own: of every ten lines of a label, eight train.
TENTHS = {"train": range(8), "valid": (8,), "test": (9,)}


def sentences(name: str, split: str = "train") -> Data:
    """Loads one of Pang and Lee's sets: a file for each label, a sentence per line.

    Only the first occurrence of a sentence is kept, so that none is on both sides of a
    split.

    Args:
      name: "sentence_polarity" or "subjectivity".
      split: "train" (8 of 10 sentences), "valid" or "test" (1 each).

    Raises:
      ValueError: there is no such set or split.
    """
    if name not in BY_FILE or split not in TENTHS:
        raise ValueError(
            f"no set {name!r} with split {split!r}: choose from {sorted(BY_FILE)} and "
            f"{list(TENTHS)}."
        )
    folder, files = BY_FILE[name]
    found: list[Labelled] = []
    malformed: list[str] = []
    seen: set[str] = set()
    for label, file in enumerate(files.values()):
        path = paths.find(f"{folder}/{file}")
        lines = records.read_lines(path)
        read = records.convert(path, lines, lambda row: row)
        malformed += read.malformed
        for i, row in enumerate(read.rows):
            text = row.values["text"].strip()
            if text not in seen and i % 10 in TENTHS[split]:
                found.append(Labelled(text, None, label, row.where))
            seen.add(text)
    return Data(tuple(found), tuple(files), tuple(malformed))


def load_split(data: ml_collections.ConfigDict, split: str) -> Data:
    """Loads a split of `config.data.name`: a GLUE task, or one of the small sets.

    Rows come in a fixed random order, so that the first ones are a fair sample: files
    are often sorted by label.

    Args:
      data: `config.data`: `name`, and for GLUE tasks `root`, the folder that holds
        them.
      split: "train" or "valid"; for MNLI, the matched validation set.
    """
    found = _read(data, split)
    order = np.random.default_rng(0).permutation(len(found.rows))
    return found._replace(rows=tuple(found.rows[i] for i in order))


def _read(data: ml_collections.ConfigDict, split: str) -> Data:
    if data.name in TASKS:
        own = split if split == "train" else TASKS[data.name].dev[0]
        return load(data.root, data.name, own)
    if data.name == "banking77":
        return banking77("train" if split == "train" else "test")
    return sentences(data.name, split)


def scores_of(name: str) -> tuple[str, ...]:
    """Returns the scores that a set is judged by."""
    return TASKS[name].scores if name in TASKS else ("accuracy",)
