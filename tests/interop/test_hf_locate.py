"""A checkpoint's name is a local directory or a hub id, never a guess."""

import sys
import types

import pytest

from lorax.interop import hf


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("stories260k", "gsm8k"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "work" / "merged").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "data"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The requests to a fake hub, which answers with a folder."""
    names = []

    def download(name, **options):
        names.append(name)
        return str(tmp_path)

    library = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    return names


def test_what_is_here_is_found_in_order(folder, asked):
    assert hf.locate("stories260k", folders=[folder]) == folder / "stories260k"
    assert hf.locate("merged", folders=[folder]).name == "merged"
    assert hf.locate(folder / "gsm8k") == folder / "gsm8k"
    assert asked == []


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("stories26k", "nearby: stories260k.* on the hub, write hf:stories26k"),
        ("megred", "nearby: merged"),
        ("./merge", "the directory ./merge does not exist; nearby: merged$"),
        ("../data/gsm9k", "nearby: gsm8k$"),
        ("../data/a/b", "the directory ../data/a/b does not exist$"),
        ("~no/such", "the directory ~no/such does not exist"),
        ("/nowhere/at/all", "the directory /nowhere/at/all does not exist$"),
    ],
)
def test_a_mistyped_name_is_not_looked_up_on_the_hub(folder, asked, source, told):
    with pytest.raises(FileNotFoundError, match=told):
        hf.locate(source, folders=[folder])
    assert asked == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("gpt2", "gpt2"),
        ("hf:stories26k", "stories26k"),
    ],
)
def test_a_hub_id_is_asked_for_by_its_name(folder, asked, source, name):
    hf.locate(source, folders=[folder])
    assert asked == [name]
