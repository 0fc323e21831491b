"""Hugging Face datasets from a local directory."""

import pytest

from experiments.data import extras
from experiments.data.sources import classification, records


def test_names_are_checked():
    with pytest.raises(ValueError, match="expected 'hf:PATH_OR_NAME:SPLIT'"):
        records.read("hf:sst2")


def test_without_the_library_the_command_is_given(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"Reading sst2 needs `datasets`.*interop"):
        records.read("hf:sst2:train")


def test_a_directory_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the interop extra")
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
        }
    )
    rows = {"sentence": ["fine", "dull", "unknown"], "label": [1, 0, -1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "set")
    name = f"hf:{tmp_path / 'set'}:train"
    with pytest.warns(UserWarning, match=r"dropped 1 malformed of 3 .*"):
        read = classification.read(name, labels=["negative", "positive"])
    assert [row[:3] for row in read.rows] == [("fine", None, 1), ("dull", None, 0)]
    assert read.rows[1].where == f"{name}[1]"
    assert read.malformed[0].startswith(f"{name}[2]: no 'label'")
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        records.read(f"hf:{tmp_path / 'set'}:test")
