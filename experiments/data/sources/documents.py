"""Real text that comes with every CPython, as documents split without leakage.

Two domains, neither of which needs a network:

- `source`: the Python files of the standard library, on which the base is pretrained;
- `topics`: the English of `pydoc_data.topics` (the language reference behind
  `help("assert")`), to which the base is adapted.

Whole documents are held out, and two documents that share a run of `RUN` words are
never on different sides of a split. The topics quote one another at length ("compound"
contains "with", "for", "try"), so they are first grouped into *families*, the connected
components of sharing such a run, and families are split. Source files that share a run
with any topic (`pdb.py` with the "debugger" topic) are left out of pretraining
altogether.
"""

import functools
import importlib
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Bumped when what the functions below return changes: it is part of the base's cache
# key, so that a base trained on other text is never used.
VERSION = 1

# Length in words of a quotation: the 13-gram overlap rule of Brown et al. (2020).
RUN = 13

# Names at the top of the standard library that are not library source: tests and their
# data, bundled or generated code, tables of codes, and the topics themselves.
SKIPPED = frozenset(
    "ensurepip encodings idlelib lib2to3 pydoc_data site-packages dist-packages "
    "test tests turtledemo __phello__ __pycache__".split()
)


class Document(NamedTuple):
    """One text, always whole and on one side of a split."""

    name: str
    text: bytes


class Splits(NamedTuple):
    """Documents by purpose: fit on `train`, tune on `selection`, report on `test`."""

    train: tuple[Document, ...]
    selection: tuple[Document, ...]
    test: tuple[Document, ...]


def topics() -> Splits:
    """Returns the English of `pydoc_data.topics`, split by families of topics.

    Families are ordered by size and dealt out in a fixed pattern, three of five to
    `train` and one each to `test` and `selection`, so that the split is the same on
    every machine with the same CPython, and similar across CPython versions.
    """
    dealt = ("train", "train", "test", "train", "selection")
    splits: dict[str, list[Document]] = {name: [] for name in Splits._fields}
    largest_first = sorted(
        (_without_repeats(family) for family in families(raw_topics())),
        key=lambda family: (-sum(len(d.text) for d in family), family[0].name),
    )
    for i, family in enumerate(largest_first):
        splits[dealt[i % len(dealt)]].extend(family)
    return Splits(**{name: tuple(found) for name, found in splits.items()})


# One in this many top-level modules and packages of the library is held out.
HELD_OUT_EVERY = 20


def source_train() -> tuple[Document, ...]:
    """Returns the standard library's source files to train on."""
    held_out = _held_out_modules()
    return _unquoted(d for d in raw_source() if _top_level(d.name) not in held_out)


def source_test() -> tuple[Document, ...]:
    """Returns the held-out source files, whole modules and packages."""
    held_out = _held_out_modules()
    return _unquoted(d for d in raw_source() if _top_level(d.name) in held_out)


@functools.cache
def raw_source() -> tuple[Document, ...]:
    """Returns all source files of the standard library but `SKIPPED`, sorted by name.

    Raises:
      FileNotFoundError: this interpreter comes without source files.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(
            d for d in below if d not in SKIPPED and not d.startswith("config-")
        )
        for path in (pathlib.Path(folder, f) for f in sorted(files)):
            if path.suffix == ".py":
                name = path.relative_to(root).as_posix()
                found.append(Document(name, path.read_bytes().replace(b"\r\n", b"\n")))
    found = sorted(d for d in found if d.text.strip())
    if not found:
        raise FileNotFoundError(
            f"No Python source under {root}, the standard library of this interpreter. "
            "The quickstart reads it as training text: use a CPython that ships its "
            "sources (python.org, conda, Debian's `libpython3-stdlib`)."
        )
    return tuple(found)


def raw_topics() -> tuple[Document, ...]:
    """Returns every topic of `pydoc_data.topics`, sorted by name.

    Raises:
      FileNotFoundError: this interpreter comes without them.
    """
    try:
        texts = importlib.import_module("pydoc_data.topics").topics
    except ImportError as e:
        raise FileNotFoundError(
            "This Python has no `pydoc_data.topics`, the text that the quickstart "
            "adapts to. It is part of CPython's standard library: install the full "
            "one (on Debian `libpython3-stdlib`)."
        ) from e
    return tuple(Document(name, texts[name].encode()) for name in sorted(texts))


def families(documents: Sequence[Document]) -> list[tuple[Document, ...]]:
    """Groups documents that share a run of `RUN` words, directly or through others."""
    parent = list(range(len(documents)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first_seen: dict[str, int] = {}
    for i, document in enumerate(documents):
        for run in runs(document.text):
            parent[root(i)] = root(first_seen.setdefault(run, i))
    grouped: dict[int, list[Document]] = {}
    for i, document in enumerate(documents):
        grouped.setdefault(root(i), []).append(document)
    return [tuple(group) for group in grouped.values()]


def runs(text: bytes) -> set[str]:
    """Returns all runs of `RUN` consecutive words, ignoring case and punctuation."""
    words = re.findall(r"\w+", text.decode("utf-8", "ignore").lower())
    return {" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def _without_repeats(family: Iterable[Document]) -> tuple[Document, ...]:
    """Drops paragraphs of `RUN` words or more that a longer document already holds."""
    seen: set[str] = set()
    kept = []
    for document in sorted(family, key=lambda d: (-len(d.text), d.name)):
        paragraphs = []
        for paragraph in document.text.decode().split("\n\n"):
            words = re.findall(r"\w+", paragraph.lower())
            normal = " ".join(words)
            if len(words) < RUN or normal not in seen:
                paragraphs.append(paragraph)
            seen.add(normal)
        text = "\n\n".join(paragraphs).encode()
        if (
            len(text) >= len(document.text) // 2
        ):  # else little but its scaffolding is left
            kept.append(Document(document.name, text))
    return tuple(kept)


def _top_level(name: str) -> str:
    """`json/decoder.py` -> `json`, `ast.py` -> `ast`."""
    return name.split("/")[0].removesuffix(".py")


def _held_out_modules() -> frozenset[str]:
    """Returns every `HELD_OUT_EVERY`-th top-level name, from half of that number on."""
    modules = sorted({_top_level(d.name) for d in raw_source()})
    return frozenset(modules[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY])


def _unquoted(found: Iterable[Document]) -> tuple[Document, ...]:
    """Returns the documents that share no run of words with any topic."""
    quotable = set().union(*(runs(topic.text) for topic in raw_topics()))
    return tuple(d for d in found if quotable.isdisjoint(runs(d.text)))
