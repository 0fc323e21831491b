"""Adapters on disk, errors: what cannot be saved, missing and damaged checkpoints."""

from __future__ import annotations

import functools
import pathlib
import re
import tempfile

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lorax import adapters, checkpoint
from lorax.adapters import AdaLora, Dora, Full, Lora, SlicedLora
from lorax.types import Axes, Field
from tests.test_checkpoint import assert_same, base, both, edit, lora


@flax.struct.dataclass
class Odd(adapters.Parametrisation):
    """A class that lorax does not know."""

    u: jax.Array

    fields = {"u": Field("u", "size")}


def test_what_cannot_be_saved_is_named(tmp_path):
    save = checkpoint.save_adapters
    with pytest.raises(ValueError, match="adapters is empty"):
        save(tmp_path, {})
    with pytest.raises(TypeError, match="w: Odd is not registered.*adapters.register"):
        save(tmp_path, {"w": Odd(jnp.ones(1))})
    with pytest.raises(TypeError, match="w: scale is inf; adapters.json holds"):
        save(tmp_path, {"w": lora(scale=float("inf"))})
    with pytest.raises(TypeError, match=r"w: layers is \{1\}; adapters.json holds"):
        save(tmp_path, {"w": lora(layers={1})})
    with pytest.raises(ValueError, match="w could not be .*static.dropout=1; it must"):
        save(tmp_path, {"w": lora(dropout=1)})
    with pytest.raises(ValueError, match=r"static.layers=\(0, 0\); it must be layer"):
        save(tmp_path, {"w": lora(layers=(0, 0))})
    with pytest.raises(KeyError, match="no leaf 'w'"):
        save(tmp_path, {"w": lora()}, base())
    with pytest.raises(ValueError, match="dense/kernel: the adapter holds a value"):
        save(tmp_path, {"dense/kernel": Full(jnp.ones(1))}, base())
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        checkpoint.load_adapters(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no adapters.json: it is another"):
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


def test_adapters_that_are_not_finite_replace_none(tmp_path):
    bad = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), both())
    checkpoint.save_adapters(tmp_path / "new", bad)  # any bits can be saved
    checkpoint.save_adapters(tmp_path / "old", both())
    with pytest.raises(ValueError, match=r"is not finite, and .*/old holds adapters"):
        checkpoint.save_adapters(tmp_path / "old", bad, overwrite=True)
    kept = checkpoint.load_adapters(tmp_path / "old")
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    checkpoint.save_adapters(tmp_path, both())
    (tmp_path / "adapters.json").write_text('{"format": 3, "library": "lorax 9.9"}')
    with pytest.raises(ValueError, match="format 3 of lorax 9.9.*upgrade lorax"):
        checkpoint.load_adapters(tmp_path)


def axes(**fields):
    whole = {"in_": [0], "out": [1], "batch": []} | fields
    return lambda e: e["static"].update(axes={"Axes": whole})


def static(**fields):
    return lambda e: e["static"].update(fields)


def array(name, **fields):
    return lambda e: e["arrays"][name].update(fields)


NUMBER = r"a number >= -3\.40\S+ and <= 3\.40"
IMPOSSIBLE = [
    (
        lambda e: e.update({"class": "Lokr"}),
        "class 'Lokr' is not registered",
    ),
    (lambda e: e.update({"class": ["Lora"]}), r"class=\['Lora'\]; it must be text"),
    (lambda e: e.pop("static"), "there is no 'static' in it"),
    (lambda e: e["static"].pop("scale"), "static: there is no 'scale' in it"),
    (lambda e: e["arrays"].pop("b"), "arrays: there is no 'b' in it"),
    (lambda e: e["arrays"].clear(), "arrays: there is no 'a' in it"),
    (lambda e: e.update(arrays=[1]), r"arrays=\[1\]; it must be an object"),
    (static(colour="red"), "static.colour: Lora has no such field; it has .*scale"),
    (static(axes={"os": {}}), "static.axes={'os': {}}; an object there must .*Axes"),
    (static(axes={"Axes": {}, "y": 1}), "an object there must have the form"),
    (static(axes={}), "an object there must have the form"),
    (static(axes=[[0], [1]]), "static.axes=.*must be an Axes that lists each axis"),
    (axes(rank=[2]), r"static.axes.Axes has the fields \['batch', 'in_', 'out', 'ra"),
    (axes(in_=0), "static.axes=.*must be an Axes"),
    (axes(in_=["0"]), "static.axes=.*must be an Axes"),
    (axes(in_=[False], out=[True]), "static.axes=.*must be an Axes"),
    (axes(in_=[0, 0]), "static.axes=.*must be an Axes"),
    (axes(in_=[-1]), "static.axes=.*must be an Axes"),
    (axes(in_=[2]), "static.axes=.*must be an Axes"),
    (axes(in_=[0, 2]), "do not fit one another"),
    (static(scale=float("nan")), f"static.scale=nan; it must be {NUMBER}"),
    (static(scale=float("inf")), f"static.scale=inf; it must be {NUMBER}"),
    (static(scale=1e300), f"static.scale=1e.300; it must be {NUMBER}"),
    (static(scale="2.0"), f"static.scale='2.0'; it must be {NUMBER}"),
    (static(scale=True), f"static.scale=True; it must be {NUMBER}"),
    (static(scale=None), f"static.scale=None; it must be {NUMBER}"),
    (static(dropout=True), "static.dropout=True; it must be a number >= 0 and < 1"),
    (static(dropout=-0.1), "static.dropout=-0.1; it must be a number >= 0 and < 1"),
    (static(dropout=1), "static.dropout=1; it must be a number >= 0 and < 1"),
    (static(layers=3), "static.layers=3; it must be layer numbers"),
    (static(layers=[]), r"static.layers=\(\); it must be layer numbers"),
    (static(layers=[1, 1]), r"static.layers=\(1, 1\); it must be layer numbers"),
    (static(layers=[0]), "layers=.0,. do not fit one another"),
    (array("a", shape=[3, True]), r"arrays.a.shape=\[3, True\]; it must be a list"),
    (array("a", shape=[3.0, 1]), r"arrays.a.shape=\[3.0, 1\]; it must be a list"),
    (array("a", shape=[-3, 1]), r"arrays.a.shape=\[-3, 1\]; it must be a list"),
    (array("a", shape=[3, 2]), "do not fit one another: arrays: the factors have"),
    (array("a", shape=[]), "do not fit one another"),
    (array("a", dtype="text"), "arrays.a.dtype='text' is not a dtype"),
    (array("a", dtype=None), "arrays.a.dtype=None; it must be text"),
    (lambda e: e["arrays"].update(q=e["arrays"]["a"]), "arrays.q: Lora has no such"),
]


@functools.cache
def index_of_both():
    """The index alone: no array is read before all of it has been validated."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_adapters(folder, both(), base())
        return pathlib.Path(folder, "adapters.json").read_text()


@pytest.mark.parametrize("change, message", IMPOSSIBLE)
def test_an_entry_that_does_not_fit_is_named(tmp_path, change, message):
    (tmp_path / "adapters.json").write_text(index_of_both())
    edit(tmp_path, lambda index: change(index["adapters"]["dense/kernel"]))
    where = re.escape(str(tmp_path / "adapters.json"))
    with pytest.raises(ValueError, match=f"{where}: dense/kernel: .*{message}"):
        checkpoint.load_adapters(tmp_path)


SEAL = {"shape": [4], "dtype": "float32"}


def front(**fields):
    return lambda index: index.update(fields)


@pytest.mark.parametrize(
    "change, message",
    [
        (front(format=-1), "format=-1; it must be an int >= 1"),
        (front(format=True), "format=True; it must be an int >= 1"),
        (front(format=1.0), "format=1.0; it must be an int >= 1"),
        (front(generation=True), "generation=True; it must be an int >= 0"),
        (front(generation=-1), "generation=-1; it must be an int >= 0"),
        (front(library=3), "library=3; it must be text"),
        (front(adapters={}), "adapters={}; it must be an object of 1 or more"),
        (front(base={}), "'dense/kernel' is in only one of base and adapters"),
        (front(base=[]), r"base=\[\]; it must be an object"),
        (lambda index: index.pop("base"), "there is no 'base' in it"),
        (
            lambda index: index["base"]["head"].update(content="0"),
            "base.head.content='0'; it must be 32 hex digits, or null",
        ),
        (
            lambda index: index["base"]["head"].pop("content"),
            "base.head: there is no 'content' in it",
        ),
        (  # as in format 1
            lambda index: index["base"].update(head=SEAL | {"sha256": "0"}),
            "base.head.sha256='0'; it must be 64 hex digits, or null",
        ),
        (
            lambda index: index["base"]["head"].update(shape=4),
            "base.head.shape=4; it must be a list",
        ),
        (front(digests=None), "digests=None; it must be an object"),
    ],
)
def test_an_index_with_an_impossible_field_is_named(tmp_path, change, message):
    (tmp_path / "adapters.json").write_text(index_of_both())
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=f"adapters.json is damaged: {message}"):
        checkpoint.load_adapters(tmp_path)


SQUARE = Axes((0,), (1,))
AXES = """"in_": [
       0
      ],
      "out": [
       1
      ]"""


@pytest.mark.parametrize(
    "old, new, told",
    [
        ('"scale": 2.5', '"scale": 2.4', "adapters.w does not match its digest"),
        (AXES, AXES.translate({48: "1", 49: "0"}), "adapters.w does not match"),
        ('"dropout": 0.0', '"dropout": 0.5', "adapters.w does not match its digest"),
        ('"class": "lora"', '"class": "dora"', "w: .*: there is no 'magnitude'"),
        ('"w": {', '"v": {', "'v' is in only one of base and adapters"),
        ('"generation": 0', '"generation": 1', "generation does not match its digest"),
        ('"content": "f', '"content": "e', "base.w does not match its digest"),
        ('"content": "', '"content": "0', "adapters.w does not match its digest"),
        ('"format": "', '"format": "0', "format does not match its digest"),
        ('"library": "lorax', '"library": "lora', "library does not match its digest"),
    ],
)
def test_a_changed_letter_is_never_silent(tmp_path, old, new, told):
    """Valid values swapped for others by hand: only the digest can tell."""
    square = Lora(jnp.ones((4, 1)), jnp.ones((1, 4)), 2.5, SQUARE)
    kernel = jnp.zeros((4, 4)).at[0, 0].set(2)  # its content begins with f
    checkpoint.save_adapters(tmp_path, {"w": square}, {"w": kernel})
    file = tmp_path / "adapters.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    for params in (None, {"w": kernel}):
        with pytest.raises(ValueError, match=rf"adapters\.json.*{told}"):
            checkpoint.load_adapters(tmp_path, params=params)


def test_a_changed_number_of_an_array_is_never_silent(tmp_path):
    checkpoint.save_adapters(tmp_path, both())
    arrays = {
        "dense/kernel": {"a": np.ones((3, 1), "f"), "b": np.ones((1, 2), "f")},
        "head": {"value": np.ones(4, "f")},
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        save = functools.partial(checkpointer.save, tmp_path / "arrays-0", force=True)
        save(args=ocp.args.PyTreeSave(arrays))
    with pytest.raises(ValueError, match="arrays-0: dense/kernel/a is damaged: its co"):
        checkpoint.load_adapters(tmp_path)


STACKED = Axes((1,), (2,), (0,))


def stacked(*shape):
    return jnp.ones((2, *shape))


@pytest.mark.once
@pytest.mark.parametrize(
    "adapter",
    [
        Lora(stacked(3, 1), stacked(1, 4), 2.0, STACKED),
        Lora(stacked(3, 1), stacked(1, 4), 2.0, STACKED, 0.1, (0, 5)),
        AdaLora(stacked(3, 2), stacked(2), stacked(2, 4), 0.5, STACKED),
        Dora(stacked(3, 1), stacked(1, 4), stacked(4), -1.0, STACKED),
        SlicedLora(
            stacked(2, 3, 1), stacked(2, 1, 5), 1.0, Axes((1,), (2, 3), (0,)), (0, 2), 3
        ),
    ],
)
def test_every_class_loads_also_as_a_population_and_without_digests(tmp_path, adapter):
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), adapter)
    adapters = {"one": adapter, "several": several}
    checkpoint.save_adapters(tmp_path, adapters)
    assert_same(checkpoint.load_adapters(tmp_path), adapters)
    edit(tmp_path, lambda index: None)
    assert_same(checkpoint.load_adapters(tmp_path), adapters)


HEAD = {"class": "full", "static": {}, "arrays": {"value": {}}}
HEAD["arrays"]["value"] = {"shape": [5], "dtype": "float32"}


@pytest.mark.parametrize(
    "change",
    [
        lambda adapters: adapters.update(head=HEAD),
        lambda adapters: adapters.update(other=HEAD),
    ],
    ids=["shape", "path"],
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
