"""A method's frozen arrays are saved with its adapters, and recognised on loading."""

import hashlib
import json

import jax
import numpy as np
import optax
import pytest

import lorax
from lorax import checkpoint, training
from tests.frozen_model import (
    IN,
    KEY,
    NORMS,
    SIGNS,
    plain,
    same,
    started,
    trained,
)


def test_what_is_saved_is_what_init_returned(tmp_path):
    adapters, base = trained()
    checkpoint.save_adapters(tmp_path, adapters, base)
    frozen = checkpoint.load_frozen(tmp_path)
    again = lorax.Base(base.params, frozen)
    same(again, base)
    loaded = checkpoint.load_adapters(tmp_path, template=adapters, params=again)
    same(loaded, adapters)
    assert loaded["up"].lent == (("signs", SIGNS), ("norms", NORMS))
    index = json.loads((tmp_path / "adapters.json").read_text())
    assert index["adapters"]["up"]["class"] == "walsh"
    assert index["frozen"][SIGNS]["shape"] == [IN]
    checkpoint.save_adapters(tmp_path, {"up": adapters["up"]}, base, overwrite=True)
    assert set(checkpoint.load_frozen(tmp_path)) == {SIGNS, NORMS}  # what it needs
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        "arrays-1",
        "frozen-1",
    ]


def test_saving_without_the_arrays_is_refused(tmp_path):
    adapters, base = trained()
    for params in (None, base.params):
        with pytest.raises(ValueError, match=r"are not a Base: write save_adapters\("):
            checkpoint.save_adapters(tmp_path, adapters, params)
    less = lorax.Base(base.params, {SIGNS: base.frozen[SIGNS]})
    with pytest.raises(ValueError, match="'down/norms' to be usable .* params lack"):
        checkpoint.save_adapters(tmp_path, adapters, less)
    assert not list(tmp_path.iterdir())


def test_frozen_arrays_are_held_to_their_digests(tmp_path):
    adapters, base = trained()
    checkpoint.save_adapters(tmp_path, adapters, base)
    _, other = started(jax.random.key(7))
    with pytest.raises(ValueError, match=f"with a frozen array '{SIGNS}'"):
        checkpoint.load_adapters(tmp_path, params=other)
    checkpoint.load_adapters(tmp_path, params=other.params)  # the kernels are the same
    place = tmp_path / "adapters.json"
    text = place.read_text()
    index = json.loads(text)
    index["frozen"][NORMS]["content"] = "0" * 32
    place.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"damaged: frozen.{NORMS} does not match"):
        checkpoint.load_frozen(tmp_path)
    index = json.loads(text)
    del index["frozen"]["down/norms"]
    place.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is in only one of adapters and frozen"):
        checkpoint.load_adapters(tmp_path)
    index = json.loads(text)
    index["adapters"]["up"]["static"]["lent"] = [["weights", SIGNS]]
    place.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'weights' is not a frozen field of Walsh"):
        checkpoint.load_adapters(tmp_path)
    index["adapters"]["up"]["static"]["lent"] = [["signs"]]
    place.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"static.lent=.*pairs \(field, name of its"):
        checkpoint.load_adapters(tmp_path)


def test_frozen_arrays_of_format_1_load(tmp_path):
    """Their digest is BLAKE2b over dtype, shape and bytes, computed here by hand."""
    adapters, base = trained()
    checkpoint.save_adapters(tmp_path, adapters, base)
    place = tmp_path / "adapters.json"
    index = json.loads(place.read_text())
    del index["digests"]
    for name, array in base.frozen.items():
        data = f"float32 {list(array.shape)} ".encode() + np.asarray(array).tobytes()
        del index["frozen"][name]["content"]
        told = hashlib.blake2b(data, digest_size=16).hexdigest()
        index["frozen"][name]["digest"] = told
    place.write_text(json.dumps(index))
    same(checkpoint.load_frozen(tmp_path), base.frozen)
    checkpoint.load_adapters(tmp_path, params=base)
    _, other = started(jax.random.key(7))
    with pytest.raises(ValueError, match=f"with a frozen array '{SIGNS}'"):
        checkpoint.load_adapters(tmp_path, params=other)
    index["frozen"][NORMS]["digest"] = "0" * 32
    place.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{NORMS} is damaged: its digest differs"):
        checkpoint.load_frozen(tmp_path)


def test_adapters_without_frozen_arrays_save_none(tmp_path):
    adapters, _ = lorax.init(KEY, plain(), [("up", 2)])
    checkpoint.save_adapters(tmp_path, adapters)
    assert checkpoint.load_frozen(tmp_path) == {}
    assert "frozen" not in json.loads((tmp_path / "adapters.json").read_text())


def test_a_run_knows_its_frozen_arrays_again(tmp_path):
    adapters, base = started()
    state = training.create_state(KEY, adapters, optax.sgd(0.1))
    with checkpoint.RunCheckpoints(tmp_path, base) as kept:
        assert kept.save(state)
    with checkpoint.RunCheckpoints(tmp_path, base) as kept:
        same(kept.restore(state).state.adapters, adapters)
    _, other = started(jax.random.key(7))
    with checkpoint.RunCheckpoints(tmp_path, other) as kept:
        with pytest.raises(ValueError, match=f"frozen:{SIGNS}: the checkpoint was"):
            kept.restore(state)
