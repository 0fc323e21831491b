"""The E2E NLG challenge: from meaning representations of restaurants to sentences.

Two forms of the same data:

- "lora_format": the files on which the LoRA paper's GPT-2 was trained, with lines
  `mr||reference`, both already tokenised: score with `tokenize="none"`;
- "official": `mr,ref` tables in the release's zip archive, as people wrote them: score
  with `tokenize="13a"`.

Training takes every pair; generation is scored once for each meaning representation,
against all of its references (630 groups in the test set).

References: Novikova et al., "The E2E dataset", arXiv:1706.09254; Hu et al., "LoRA",
arXiv:2106.09685, table 3.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple

from experiments.data.examples import Pair
from experiments.data.sources import paths, records

SEPARATOR = "||"

LORA_FORMAT = "e2e_nlg/lora_format/{}.txt.gz"
OFFICIAL = "e2e_nlg/e2e-dataset.zip/e2e-dataset/{}.csv"
FILES = {
    "lora_format": {
        "train": LORA_FORMAT.format("train"),
        "valid": LORA_FORMAT.format("valid"),
        "test": LORA_FORMAT.format("test"),
    },
    "official": {
        "train": OFFICIAL.format("trainset"),
        "valid": OFFICIAL.format("devset"),
        "test": OFFICIAL.format("testset_w_refs"),
    },
}
# How each form is tokenised for scoring, see `experiments.tasks.scoring.words`.
TOKENIZE = {"lora_format": "none", "official": "13a"}


class Group(NamedTuple):
    """A prompt and all the references against which its output is scored."""

    prompt: str
    references: tuple[str, ...]


class Data(NamedTuple):
    """Pairs in the order of the file."""

    pairs: tuple[Pair, ...]
    malformed: tuple[str, ...]


def load(split: str, form: str = "lora_format") -> Data:
    """Loads one split from the folder of data sets.

    Args:
      split: "train", "valid" or "test".
      form: "lora_format" or "official".

    Raises:
      ValueError: the split or the form is unknown.
      FileNotFoundError: the data are missing; see `paths.find`.
    """
    try:
        name = FILES[form][split]
    except KeyError:
        raise ValueError(
            f"E2E has no split {split!r} of form {form!r}: choose from "
            f"{[(f, s) for f, splits in FILES.items() for s in splits]}."
        ) from None
    return read(paths.find(name))


def read(path: str | os.PathLike[str]) -> Data:
    """Reads a file of either form: a `.csv` table, or `mr||reference` lines.

    The prompt of a pair is the meaning representation followed by `||`, which separates
    it from the sentence to write.
    """
    if str(path).removesuffix(".gz").endswith(".csv"):
        made = records.read(path, columns=["mr", "ref"], use=_stripped)
    else:
        lines = records.read_lines(path)
        made = records.convert(path, lines, lambda row: _stripped(_split_line(row)))
    pairs = (
        Pair(f"{row.values['mr']}{SEPARATOR}", row.values["ref"], row.where)
        for row in made.rows
    )
    return Data(tuple(pairs), made.malformed)


def groups(pairs: Iterable[Pair]) -> list[Group]:
    """Groups pairs by prompt, in the order in which prompts first occur."""
    gathered: dict[str, list[str]] = {}
    for pair in pairs:
        gathered.setdefault(pair.prompt, []).append(pair.response)
    return [Group(prompt, tuple(found)) for prompt, found in gathered.items()]


def _split_line(row: records.Row) -> records.Row:
    """Splits `mr||reference` into its two columns."""
    parts = row.values["text"].split(SEPARATOR)
    if len(parts) != 2:
        raise records.MalformedRow(f"{len(parts) - 1} times '||', expected it once")
    return records.Row(row.where, {"mr": parts[0], "ref": parts[1]})


def _stripped(row: records.Row) -> records.Row:
    """Strips both columns, neither of which may be empty."""
    values = {name: row.values[name].strip() for name in ("mr", "ref")}
    for name, text in values.items():
        if not text:
            raise records.MalformedRow(f"{name!r} is empty")
    return records.Row(row.where, values)
