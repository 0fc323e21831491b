"""Adapters on disk, gone wrong: what cannot be saved, no checkpoint, a damaged one."""

from __future__ import annotations

import json

import flax.struct
import jax
import jax.numpy as jnp
import pytest

from lorax import checkpoint
from lorax.adapters import Full
from tests.test_checkpoint import base, both, lora


def edit(path, change):
    """Passes the index through `change` and writes it back."""
    index = json.loads((path / "adapters.json").read_text())
    change(index)
    (path / "adapters.json").write_text(json.dumps(index))


@flax.struct.dataclass
class Odd:
    """A class that lorax does not know."""

    u: jax.Array


def test_what_cannot_be_saved_is_named(tmp_path):
    save = checkpoint.save_adapters
    with pytest.raises(ValueError, match="adapters is empty"):
        save(tmp_path, {})
    with pytest.raises(TypeError, match="w: Odd is not in lorax.adapters.CLASSES"):
        save(tmp_path, {"w": Odd(jnp.ones(1))})
    with pytest.raises(TypeError, match="w: scale is inf; adapters.json holds"):
        save(tmp_path, {"w": lora(scale=float("inf"))})
    with pytest.raises(TypeError, match=r"w: layers is \{1\}; adapters.json holds"):
        save(tmp_path, {"w": lora(layers={1})})
    with pytest.raises(KeyError, match="no leaf 'w'"):
        save(tmp_path, {"w": lora()}, base())
    with pytest.raises(ValueError, match="dense/kernel: the adapter holds a value"):
        save(tmp_path, {"dense/kernel": Full(jnp.ones(1))}, base())
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        checkpoint.load_adapters(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no adapters.json: another kind"):
        checkpoint.load_adapters(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"format": "1"}', "\x00", "[" * 100_000]
)
def test_a_damaged_index_is_named(tmp_path, text):
    checkpoint.save_adapters(tmp_path, both())
    (tmp_path / "adapters.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapters\.json is damaged"):
        checkpoint.load_adapters(tmp_path)
    checkpoint.save_adapters(tmp_path, both(), overwrite=True)
    assert list(checkpoint.load_adapters(tmp_path)) == list(both())


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    checkpoint.save_adapters(tmp_path, both())
    (tmp_path / "adapters.json").write_text('{"format": 2, "library": "lorax 9.9"}')
    with pytest.raises(ValueError, match="format 2 of lorax 9.9.*upgrade lorax"):
        checkpoint.load_adapters(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda e: e.update({"class": "Lokr"}),
            r"class 'Lokr' is none of .*upgrade lorax",
        ),
        (lambda e: e.update({"class": ["Lora"]}), "unhashable"),
        (lambda e: e.pop("static"), "'static'"),
        (lambda e: e["static"].update(colour="red"), "'colour'"),
        (lambda e: e["static"].update(x={"os": {}}), "'os'"),
        (lambda e: e["static"].update(x={"Axes": {}, "y": 1}), "too many values"),
        (lambda e: e["arrays"].update(q={"shape": [1], "dtype": "float32"}), "'q'"),
        (lambda e: e["arrays"]["value"].update(dtype="text"), "text"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(tmp_path, change, message):
    checkpoint.save_adapters(tmp_path, both())
    edit(tmp_path, lambda index: change(index["adapters"]["head"]))
    with pytest.raises(ValueError, match=f"head: its entry.*{message}"):
        checkpoint.load_adapters(tmp_path)


HEAD = {"class": "Full", "static": {}, "arrays": {"value": {}}}
HEAD["arrays"]["value"] = {"shape": [5], "dtype": "float32"}


@pytest.mark.parametrize(
    "change",
    [
        lambda adapters: adapters.update(head=HEAD),
        lambda adapters: adapters.update(other=HEAD),
        lambda adapters: adapters["head"]["arrays"].clear(),
    ],
    ids=["shape", "path", "field"],
)
def test_an_index_that_the_arrays_do_not_fit_is_named(tmp_path, change):
    checkpoint.save_adapters(tmp_path, both())
    edit(tmp_path, lambda index: change(index["adapters"]))
    with pytest.raises(ValueError, match=r"arrays-0.* damaged"):
        checkpoint.load_adapters(tmp_path)


def test_damaged_arrays_are_named(tmp_path):
    checkpoint.save_adapters(tmp_path, both())
    for file in (tmp_path / "arrays-0").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"arrays-0 are damaged"):
        checkpoint.load_adapters(tmp_path)
    (tmp_path / "arrays-0").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"arrays-0 are damaged"):
        checkpoint.load_adapters(tmp_path)
