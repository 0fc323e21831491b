"""Every notebook runs as it is committed: a fresh copy, a fresh kernel, its asserts."""

import re

import pytest

from tests import children

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'notebooks'")

NOTEBOOKS = sorted((children.ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
LONG = ("02", "03", "04", "05", "06")  # up to a minute each; pytest -m slow runs them
runs = [
    pytest.param(path, marks=pytest.mark.slow if path.stem[:2] in LONG else ())
    for path in NOTEBOOKS
]


def test_all_six_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@each
def test_it_is_committed_short_and_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(notebook.cells) <= 25
    first, second = notebook.cells[:2]
    assert first.cell_type == "markdown"
    assert re.search(r"\*\*Running time\.\*\* About \d+ s", first.source)
    assert "**Question.**" in first.source and "**Answer.**" in first.source
    for cell in notebook.cells[1:]:  # one title, and text that is none
        if cell.cell_type == "markdown":
            assert not re.search("^#( |$)", cell.source, re.MULTILINE)
    assert "%pip install" in second.source and "import jax" not in second.source
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.once
@pytest.mark.parametrize("path", runs, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_it_says(path):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'notebooks'")
    pytest.importorskip("ipykernel", reason="needs the extra 'notebooks'")
    notebook = nbformat.read(path, as_version=4)
    # The checkout's lorax; one device, unless the notebook itself asks for more.
    environment = children.environment()
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,  # a cell, on a machine with more to do
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=environment)  # an assert that fails raises, with its cell
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    figures = [
        out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})
    ]
    if path.stem[:2] in ("01", "02", "03", "04"):
        assert figures
    assert all(len(figure) < 100_000 for figure in figures)  # base64: small to keep
