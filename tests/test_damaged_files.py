"""Each field of each file set to null, text, huge, NaN, ...: never raw or silent.

`python -m tests.test_damaged_files` prints the table of all cases.
"""

from __future__ import annotations

import collections
import pathlib
import sys
import tempfile

import numpy as np
import pytest

from tests import damaged, damaged_sources

pytestmark = pytest.mark.once

SEED = 16


def cases_of(sources):
    """All cases in a fixed random order, so that every tenth is a fair sample."""
    found = []
    for name, source in sources.items():
        if source.file.endswith(".safetensors"):
            found += damaged.tensor_cases(name, source)
        else:
            found += damaged.json_cases(name, source, SEED)
    order = np.random.default_rng(SEED).permutation(len(found))
    return [found[i] for i in order]


def run(folder, every=1, start=0):
    """Returns `{source: Counter of outcomes}` and the failed cases."""
    sources = damaged_sources.every(folder)
    sound = {name: source.load(source.folder) for name, source in sources.items()}
    table = {name: collections.Counter() for name in sources}
    wrong = []
    for case in cases_of(sources)[start::every]:
        source = sources[case.source]
        what = damaged.outcome(source, case, sound[case.source], folder / "case")
        if what not in ("loaded", "refused"):
            wrong.append((case, what))
            what = what.partition(":")[0]
        table[case.source][what] += 1
    return table, wrong


def shown(table):
    """The table as text."""
    kinds = ["loaded", "refused"]
    kinds += sorted({what for counts in table.values() for what in counts} - {*kinds})
    rows = [("file", "cases", *kinds)]
    table = table | {"all": sum(table.values(), collections.Counter())}
    for name, counts in table.items():
        rows.append((name, counts.total(), *(counts[kind] for kind in kinds)))
    return "\n".join(
        f"{row[0]:40}" + "".join(f"{cell!s:>10}" for cell in row[1:]) for row in rows
    )


def test_a_tenth_of_the_cases(tmp_path):
    table, wrong = run(tmp_path, every=10)
    assert not wrong, wrong[:5]
    counts = sum(table.values(), collections.Counter())
    assert counts["refused"] >= 200 and counts["loaded"] >= 80


@pytest.mark.slow
def test_every_case(tmp_path):
    table, wrong = run(tmp_path)
    print(shown(table))
    assert not wrong, wrong[:5]
    assert sum(counts.total() for counts in table.values()) >= 800


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        step, first = ([int(a) for a in sys.argv[1:]] + [1, 0])[:2]
        counted, found = run(pathlib.Path(scratch), step, first)
    print(shown(counted))
    for case, what in found:
        print(*case, "->", what)
