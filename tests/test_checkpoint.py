"""Adapters on disk: files by hand, exact bits, interruption, templates, bases."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from lorax import adapters as adapter_classes
from lorax import checkpoint
from lorax.adapters import Full, Lora
from lorax.types import Axes, Field
from tests.checkpoint.test_digests import content_of


def lora(scale=2.0, dtype=jnp.float32, **static):
    """A rank-1 adapter of a kernel `[3, 2]`."""
    a, b = jnp.arange(3.0).reshape(3, 1), jnp.ones((1, 2)) / 3
    return Lora(a.astype(dtype), b.astype(dtype), scale, Axes((0,), (1,)), **static)


def base():
    """The tree that `lora` and the head belong to."""
    kernel = jnp.arange(6, dtype=jnp.float32).reshape(3, 2)
    return {"dense": {"kernel": kernel, "bias": jnp.zeros(2)}, "head": jnp.ones(4)}


def both():
    """An adapter of each class."""
    return {"dense/kernel": lora(), "head": Full(jnp.ones(4))}


def assert_same(left, right):
    """Same paths, statics (with their types), dtypes and bits."""
    assert list(left) == list(right)
    for path, adapter in left.items():
        assert type(adapter) is type(right[path])
        for field in dataclasses.fields(adapter):
            one, two = getattr(adapter, field.name), getattr(right[path], field.name)
            assert type(one) is type(two), field.name
            if isinstance(one, jax.Array):
                assert one.dtype == two.dtype and one.shape == two.shape
                assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
            else:
                assert one == two, field.name


def blake2b(text):
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def edit(path, change):
    """Passes the index through `change` and writes it back, without digests."""
    index = json.loads((path / "adapters.json").read_text())
    del index["digests"]
    change(index)
    (path / "adapters.json").write_text(json.dumps(index))


# By hand


def test_the_index_by_hand(tmp_path):
    checkpoint.save_adapters(tmp_path, both(), base())
    index = json.loads((tmp_path / "adapters.json").read_text())
    library, digests = index.pop("library"), index.pop("digests")
    assert library.startswith("lorax ")
    assert digests["format"] == blake2b(b'["format",2]')
    assert digests["generation"] == blake2b(b'["generation",0]')
    assert digests["library"] == blake2b(f'["library","{library}"]'.encode())
    told = json.dumps(index["base"]["head"], sort_keys=True, separators=(",", ":"))
    assert digests["base"]["head"] == blake2b(f'["base","head",{told}]'.encode())
    assert digests["adapters"].keys() == digests["base"].keys() == both().keys()
    assert len(digests) == 5

    def leaf(shape, *numbers):
        words = np.float32(numbers).view(np.uint32).tolist()
        return {"shape": shape, "dtype": "float32", "content": content_of(words)}

    assert index == {
        "format": 2,
        "generation": 0,
        "adapters": {
            "dense/kernel": {
                "class": "lora",
                "module": "lorax.adapters.lora",
                "static": {
                    "scale": 2.0,
                    "axes": {"Axes": {"in_": [0], "out": [1], "batch": []}},
                    "dropout": 0.0,
                    "layers": None,
                    "moved_by": None,
                },
                "arrays": {
                    "a": leaf([3, 1], 0, 1, 2),
                    "b": leaf([1, 2], 1 / 3, 1 / 3),
                },
            },
            "head": {
                "class": "full",
                "module": "lorax.adapters.full",
                "static": {},
                "arrays": {"value": leaf([4], 1, 1, 1, 1)},
            },
        },
        "base": {
            "dense/kernel": leaf([3, 2], 0, 1, 2, 3, 4, 5),
            "head": leaf([4], 1, 1, 1, 1),
        },
    }


def test_the_arrays_are_plain_orbax(tmp_path):
    checkpoint.save_adapters(tmp_path, both())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore = ocp.RestoreArgs(restore_type=np.ndarray)
        args = {
            "dense/kernel": {"a": restore, "b": restore},
            "head": {"value": restore},
        }
        args = ocp.args.PyTreeRestore(restore_args=args)
        arrays = checkpointer.restore(tmp_path / "arrays-0", args=args)
    np.testing.assert_array_equal(arrays["dense/kernel"]["a"], [[0], [1], [2]])
    np.testing.assert_array_equal(arrays["head"]["value"], np.ones(4))


# Round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_bits_survive(tmp_path, dtype):
    special = jnp.array([0.1, -0.0, 1e-3, jnp.nan, 240.0], dtype)
    adapters = {"w": Full(special), "scalar": Full(jnp.array(1.5, dtype))}
    checkpoint.save_adapters(tmp_path / "adapter", adapters)
    assert_same(checkpoint.load_adapters(tmp_path / "adapter"), adapters)


def test_float64_needs_x64(tmp_path):
    with jax.enable_x64(True):
        adapters = {"w": Full(jnp.array([0.1, 1 / 3]))}
        checkpoint.save_adapters(tmp_path, adapters)
        loaded = checkpoint.load_adapters(tmp_path)
        assert loaded["w"].value.dtype == jnp.float64
        assert_same(loaded, adapters)
    with pytest.raises(ValueError, match="float64, which JAX would round.*enable_x64"):
        checkpoint.load_adapters(tmp_path)


@pytest.mark.parametrize(
    "scale",
    [0.1, 16 / 3, 5e-324, np.float64(0.1), np.float32(0.1), jnp.float32(0.1), 2],
)
def test_statics_survive(tmp_path, scale):
    stacked = Lora(
        jnp.ones((2, 3, 4, 1)),
        jnp.ones((2, 1, 5)),
        scale,
        Axes((1, 2), (3,), (0,)),
        dropout=0.1,
        layers=(np.int64(0), 7),
    )
    checkpoint.save_adapters(tmp_path, {"h/0/w": stacked})
    loaded = checkpoint.load_adapters(tmp_path)["h/0/w"]
    exact = scale if isinstance(scale, int) else float(scale)
    assert loaded.scale == exact and type(loaded.scale) is type(exact)
    assert loaded.axes == stacked.axes and type(loaded.axes) is Axes
    assert (loaded.dropout, loaded.layers) == (0.1, (0, 7))
    hash(jax.tree.structure(loaded))  # every static field is still hashable


def test_paths_that_look_alike_stay_apart(tmp_path):
    # Orbax joins keys by dots: "a.b" and "a" -> "b" would be one array to it.
    paths = ["a.b/value", "a/b.value", "a%2Eb/value", "a b/é", "0", "x/0/kernel"]
    adapters = {path: Full(jnp.full(2, float(i))) for i, path in enumerate(paths)}
    checkpoint.save_adapters(tmp_path, adapters)
    loaded = checkpoint.load_adapters(tmp_path)
    assert_same(loaded, adapters)


@flax.struct.dataclass
class Odd(adapter_classes.Parametrisation):
    """A class with an optional array, an optional static field, and a string."""

    u: jax.Array
    gate: jax.Array | None = None
    note: str = flax.struct.field(pytree_node=False, default="plain")
    nested: tuple = flax.struct.field(pytree_node=False, default=())

    fields = {"u": Field("u", "size"), "gate": Field("gate", "size")}


@pytest.fixture(name="odd")
def register_odd(monkeypatch):
    monkeypatch.setitem(adapter_classes.REGISTRY, "odd", Odd)
    return Odd


def test_any_registered_dataclass_round_trips(tmp_path, odd):
    adapters = {
        "bare": odd(jnp.ones(2)),
        "full": odd(jnp.ones(2), jnp.zeros(1), "é", ((1, (2.5, None)), True, "x")),
    }
    checkpoint.save_adapters(tmp_path, adapters)
    assert_same(checkpoint.load_adapters(tmp_path), adapters)


def test_a_field_added_later_takes_its_default(tmp_path, odd):
    checkpoint.save_adapters(tmp_path, {"w": odd(jnp.ones(2), note="old")})
    edit(tmp_path, lambda index: index["adapters"]["w"]["static"].pop("nested"))
    assert checkpoint.load_adapters(tmp_path)["w"].nested == ()


# Overwriting and interruption


def test_overwriting_is_explicit(tmp_path):
    checkpoint.save_adapters(tmp_path, {"head": Full(jnp.zeros(4))})
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        checkpoint.save_adapters(tmp_path, both())
    for adapters in ({"head": Full(jnp.ones(2))}, both()):
        checkpoint.save_adapters(tmp_path, adapters, overwrite=True)
        assert_same(checkpoint.load_adapters(tmp_path), adapters)
        assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("moment", ["arrays", "index", "move"])
def test_an_interrupted_save_leaves_no_checkpoint_or_the_old(
    tmp_path, monkeypatch, moment
):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    owner, name = {
        "arrays": (ocp.Checkpointer, "save"),
        "index": (type(epath.Path(tmp_path)), "write_text"),
        "move": (type(epath.Path(tmp_path)), "replace"),
    }[moment]
    fresh, old = tmp_path / "fresh", {"head": Full(jnp.zeros(4))}
    checkpoint.save_adapters(tmp_path / "old", old)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        for path in (fresh, tmp_path / "old"):
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save_adapters(path, both(), overwrite=True)
    with pytest.raises((ValueError, FileNotFoundError), match="fresh"):
        checkpoint.load_adapters(fresh)
    assert_same(checkpoint.load_adapters(tmp_path / "old"), old)
    for path in (fresh, tmp_path / "old"):  # leftovers do no harm
        checkpoint.save_adapters(path, both(), overwrite=path != fresh)
        assert_same(checkpoint.load_adapters(path), both())
        left = {p.name for p in path.iterdir()}
        assert len(left) == 2 and "adapters.json" in left


# Templates


def test_a_template_that_fits_changes_nothing(tmp_path):
    checkpoint.save_adapters(tmp_path, both())
    scale = both() | {"dense/kernel": lora(scale=np.float32(2))}
    for template in (both(), jax.eval_shape(both), scale):
        assert_same(checkpoint.load_adapters(tmp_path, template), both())
    spec = jax.sharding.PartitionSpec()
    place = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), spec)
    loaded = checkpoint.load_adapters(tmp_path, jax.device_put(both(), place))
    assert loaded["head"].value.sharding == place


@pytest.mark.parametrize(
    "other, message",
    [
        (lora(scale=1.0), "scale=2.0 and the template scale=1.0"),
        (lora(dropout=0.1), "dropout=0.0 and the template dropout=0.1"),
        (lora(layers=(1,)), r"layers=None and the template layers=\[1\]"),
        (lora().replace(axes=Axes((1,), (0,))), r"axes=.*'in_': \[0\].*'in_': \[1\]"),
        (lora(dtype=jnp.bfloat16), "a=.*float32.*the template a=.*bfloat16"),
        (
            lora().replace(a=jnp.ones((4, 1))),
            r"a=.*\[3, 1\].*the template a=.*\[4, 1\]",
        ),
        (Full(jnp.ones(4)), "class lora and the template full"),
    ],
)
def test_a_template_that_differs_is_named(tmp_path, other, message):
    checkpoint.save_adapters(tmp_path, both())
    with pytest.raises(
        ValueError, match=rf"dense/kernel: the checkpoint has {message}"
    ):
        checkpoint.load_adapters(tmp_path, both() | {"dense/kernel": other})


def test_a_template_of_other_paths_is_named(tmp_path):
    checkpoint.save_adapters(tmp_path, both())
    with pytest.raises(ValueError, match="head: only the checkpoint has an adapter"):
        checkpoint.load_adapters(tmp_path, {"dense/kernel": lora()})
    with pytest.raises(
        ValueError, match="dense/bias: only the template has an adapter"
    ):
        checkpoint.load_adapters(tmp_path, both() | {"dense/bias": Full(jnp.ones(2))})


# The base


def test_the_base_is_recognised(tmp_path):
    checkpoint.save_adapters(tmp_path, both(), base())
    params = base()
    params["dense"]["bias"] += 1.0  # not adapted, so it may differ
    abstract = jax.eval_shape(base)
    for tree in (
        params,
        {"params": params},
        jax.tree.map(np.asarray, params),
        abstract,
    ):
        assert_same(checkpoint.load_adapters(tmp_path, params=tree), both())


def test_another_base_is_named(tmp_path):
    checkpoint.save_adapters(tmp_path, both(), base())
    params = base()
    params["dense"]["kernel"] = params["dense"]["kernel"].at[0, 0].set(1e-7)
    with pytest.raises(ValueError, match="dense/kernel: .* another base: content"):
        checkpoint.load_adapters(tmp_path, params=params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base())
    with pytest.raises(
        ValueError, match="dense/kernel: .* another base: dtype float32"
    ):
        checkpoint.load_adapters(tmp_path, params=rounded)
    with pytest.raises(ValueError, match=r"dense/kernel: the factors have shapes"):
        checkpoint.load_adapters(
            tmp_path, params=base() | {"dense": {"kernel": jnp.ones((4, 2))}}
        )
    with pytest.raises(KeyError, match="'dense/kernel'; nearest paths: 'kernel'"):
        checkpoint.load_adapters(tmp_path, params={"kernel": jnp.ones((3, 2))})
    assert_same(checkpoint.load_adapters(tmp_path), both())


@pytest.mark.parametrize("params", [None, jax.eval_shape(base)])
def test_a_base_saved_without_values_still_fixes_the_shapes(tmp_path, params):
    checkpoint.save_adapters(tmp_path, both(), params)
    assert_same(checkpoint.load_adapters(tmp_path, params=base()), both())
    with pytest.raises(ValueError, match="dense/kernel: the factors have shapes"):
        wide = base() | {"dense": {"kernel": jnp.ones((3, 3))}}
        checkpoint.load_adapters(tmp_path, params=wide)
