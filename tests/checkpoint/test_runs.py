"""The state of a run: round trips, what is kept, other meshes, mismatches."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax import checkpoint
from lorax.checkpoint import RunCheckpoints, record
from lorax.checkpoint.folders import KeepLastAndBest
from tests.checkpoint.states import base, filled, fresh, same


def test_a_round_trip_is_bit_exact(tmp_path):
    state, config = filled(1, 7), {"rank": 2, "betas": (0.9, 0.999)}
    with RunCheckpoints(tmp_path / "run", base(), config=config) as one:
        assert one.restore(fresh()) is None
        assert not (tmp_path / "run").exists()
        assert one.save(state, {"position": 2**60, "packer": [[1, 2], None]})
        assert not one.save(state)
        one.wait()
        assert same(one.restore(fresh()).state, state)
    with RunCheckpoints(tmp_path / "run", base()) as two:
        restored = two.restore(jax.eval_shape(fresh))
    assert same(restored.state, state)
    assert restored.step == 7 and restored.metrics == {}
    assert restored.data == {"position": 2**60, "packer": [[1, 2], None]}
    assert restored.config == {"rank": 2, "betas": [0.9, 0.999]}
    leaves = jax.tree.leaves(restored.state.replace(key=None))
    assert not any(leaf.weak_type for leaf in leaves)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators(tmp_path, impl):
    state = filled(1, 3, fresh(impl=impl))
    with RunCheckpoints(tmp_path) as run:
        run.save(state)
        assert same(run.restore(jax.eval_shape(lambda: fresh(impl=impl))).state, state)
        with pytest.raises(
            ValueError, match=r"key: the checkpoint has dtype=key<u?rbg> "
        ):
            run.restore(fresh())


def test_what_is_saved_may_be_donated(tmp_path):
    state = filled(1, 7)
    expected = jax.tree.map(jnp.copy, state)
    donate = jax.jit(
        lambda s: s.replace(adapters=jax.tree.map(jnp.zeros_like, s.adapters)),
        donate_argnums=0,
    )
    with RunCheckpoints(tmp_path) as run:
        run.save(state)
        donate(state)
        run.wait()
        assert same(run.restore(fresh()).state, expected)


def test_the_files_by_hand(tmp_path):
    with RunCheckpoints(tmp_path, base(), source="some/base") as run:
        run.save(filled(1, 7), metrics={"loss": 1.5, "bad": float("nan")})
    saved = json.loads((tmp_path / "7" / "run" / "metadata").read_text())
    assert saved["format"] == 2
    payload = saved["payload"]
    assert payload["step"] == 7 and payload["metrics"] == {"loss": 1.5, "bad": None}
    assert payload["base"]["source"] == "some/base"
    assert payload["base"]["leaves"]["dense/kernel"]["shape"] == [6, 4]
    assert payload["adapters"]["dense/kernel"]["static"]["scale"] == 2.0
    assert payload["versions"]["jax"] == jax.__version__
    kinds = {n: (e["shape"], e["dtype"]) for n, e in payload["leaves"].items()}
    assert kinds["adapters/dense/kernel/a"] == ([6, 2], "float32")
    assert kinds["opt_state/0/mu/dense/kernel/b"] == ([2, 4], "float32")
    assert kinds["model_state/mean"] == ([3], "bfloat16")
    assert kinds["key"] == ([], "key<fry>") and kinds["step"] == ([], "int32")
    assert all(len(entry["content"]) == 32 for entry in payload["leaves"].values())


def test_the_last_and_the_best_stay(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 2.5}
    for steps in ((1, 2, 3), (4, 5)):  # the best is known after a restart too
        with RunCheckpoints(tmp_path, keep=2, best="loss") as run:
            run.restore(fresh())
            for step in steps:
                run.save(filled(step, step), metrics={"loss": losses[step]})
    assert run.steps() == [2, 4, 5]
    assert same(run.restore(fresh(), step=2).state, filled(2, 2))
    with pytest.raises(FileNotFoundError, match=r"no step 3; it has \[2, 4, 5\]"):
        run.restore(fresh(), step=3)


def test_numbers_that_are_not_finite_replace_none_that_are(tmp_path):
    def spoil(step, path, value):
        state = filled(1, step)
        leaf = lambda p, x: x.at[(0,) * x.ndim].set(value) if path in name(p) else x
        name = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
        return jax.tree_util.tree_map_with_path(leaf, state)

    told = r"step 3: {}: 1 of its 12 values are NaN or infinite.*\[2\], are intact"
    with RunCheckpoints(tmp_path / "a", keep=1) as run:
        run.save(filled(1, 2))
        for name in ("adapters/dense/kernel/a", "opt_state/0/nu/dense/kernel/a"):
            for value in (jnp.nan, jnp.inf):
                with pytest.raises(ValueError, match=told.format(name)):
                    run.save(spoil(3, name, value))
        with pytest.raises(ValueError, match="model_state/mean: 1 of its 3"):
            run.save(spoil(3, "model_state/mean", -jnp.inf))
        assert run.save(filled(1, 3))
    assert run.steps() == [3] and same(run.restore(fresh()).state, filled(1, 3))

    # What starts at infinity, in the optimiser or the model, may stay there.
    name = "model_state/mean"
    for path, value in (("adapters/head", jnp.inf), (name, jnp.nan)):
        with RunCheckpoints(tmp_path / "b") as run:
            with pytest.raises(ValueError, match=r"values are NaN.*, \[\], are intact"):
                run.save(spoil(1, path, value))
    for step in (1, 2):
        with RunCheckpoints(tmp_path / "b") as run:
            run.restore(fresh())
            assert run.save(spoil(step, name, jnp.inf))
    with RunCheckpoints(tmp_path / "b") as run:
        run.restore(fresh())
        assert run.save(filled(1, 3))
        with pytest.raises(ValueError, match="step 4: model_state/mean: 1 of its 3"):
            run.save(spoil(4, name, jnp.inf))


def test_the_largest_may_be_the_best():
    policy = KeepLastAndBest(1, "f1", "max")
    policy.metrics = {1: {"f1": 0.2}, 2: {"f1": 0.9}, 3: {}}
    steps = [types.SimpleNamespace(step=step) for step in (1, 2, 3)]
    assert policy.should_preserve(steps, context=None) == [False, True, True]
    policy.best = None
    assert policy.should_preserve(steps, context=None) == [False, False, True]


def shard(state, mesh, spec):
    """Puts the state on a mesh: matrices by `spec`, the rest replicated."""
    place = lambda leaf: NamedSharding(mesh, spec if leaf.ndim == 2 else P())
    return jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), state)


def test_another_mesh(tmp_path):
    devices = np.array(jax.devices()[:4])
    one, two = Mesh(devices[:2], "x"), Mesh(devices.reshape(2, 2), ("x", "y"))
    state = filled(1, 7)
    with RunCheckpoints(tmp_path, shard(base(), one, P(None, "x"))) as run:
        run.save(shard(state, one, P("x")))
    with RunCheckpoints(tmp_path, base()) as run:
        restored = run.restore(template := shard(fresh(), two, P("x", "y"))).state
        assert same(restored, state)
        for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(template)):
            assert leaf.sharding == like.sharding and leaf.committed
        assert not any(x.committed for x in jax.tree.leaves(run.restore(state).state))


@pytest.mark.parametrize(
    "template, message",
    [
        (lambda: fresh(rank=3), r"dense/kernel: .*a=.*\[6, 2\].*template a=.*\[6, 3\]"),
        (
            lambda: fresh(scale=1.0),
            "dense/kernel: .*scale=2.0 and the template scale=1",
        ),
        (lambda: fresh(head=False), "head: only the checkpoint has an adapter"),
        (lambda: fresh(tx=optax.sgd(0.1)), "opt_state/.*: only the checkpoint has it"),
        (
            lambda: fresh().replace(model_state={"mean": jnp.zeros(2)}),
            "model_state/seen: only the checkpoint",
        ),
        (
            lambda: fresh().replace(
                adapters={
                    **fresh().adapters,
                    "dense/kernel": fresh().adapters["head"],
                }
            ),
            "dense/kernel: the checkpoint has class lora and the template full",
        ),
        (
            lambda: fresh().replace(skipped=jnp.zeros((), jnp.float32)),
            "skipped: the checkpoint has dtype=int32 and the template dtype=float32",
        ),
    ],
    ids=["rank", "static", "targets", "optimiser", "model", "class", "dtype"],
)
def test_another_template_is_named(template, message, saved_once):
    with pytest.raises(ValueError, match=message):
        RunCheckpoints(saved_once).restore(template())


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with RunCheckpoints(folder, base(), source="some/base") as run:
        run.save(filled(1, 7))
    return folder


@pytest.mark.parametrize(
    "params, message",
    [
        (base(1), "dense/kernel: .*another base, from some/base: content"),
        (
            {**base(), "head": jnp.zeros(5)},
            r"head: .*shape \[4\] there, \[5\] in params",
        ),
        ({**base(), "more": jnp.zeros(1)}, "more: only the params has it"),
        ({"head": base()["head"]}, "dense/kernel: only the checkpoint's base"),
    ],
    ids=["content", "shape", "more", "less"],
)
def test_another_base_is_named(saved_once, params, message):
    with pytest.raises(ValueError, match=message):
        RunCheckpoints(saved_once, params).restore(fresh())


def test_a_base_without_values_is_compared_by_shape(saved_once):
    abstract = jax.eval_shape(base)
    assert RunCheckpoints(saved_once, abstract).restore(fresh()).step == 7


def test_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, which is not a step"):
        RunCheckpoints(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        RunCheckpoints(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").rename(tmp_path / "7")
    with pytest.raises(ValueError, match="holds 7, which is not a step"):
        RunCheckpoints(tmp_path)
    (tmp_path / "7").rename(tmp_path / "x")
    (tmp_path / "7").mkdir()
    (tmp_path / "x").rename(tmp_path / "7" / "notes.txt")
    with pytest.raises(ValueError, match="holds 7, which is not a step"):
        RunCheckpoints(tmp_path)
    assert (tmp_path / "7" / "notes.txt").read_text() == "mine"


def test_adapters_are_no_run(tmp_path):
    checkpoint.save_adapters(tmp_path, fresh().adapters)
    with pytest.raises(ValueError, match=r"which is not a step of a lorax run"):
        RunCheckpoints(tmp_path)


def test_what_another_course_saved_is_not_written_over(tmp_path):
    with RunCheckpoints(tmp_path) as run:
        run.save(filled(1, 5))
        run.save(filled(2, 9))
    for step in (3, 9):
        with pytest.raises(ValueError, match=f"holds step 9 .*this is step {step}"):
            RunCheckpoints(tmp_path).save(filled(3, step))
    rewound = RunCheckpoints(tmp_path)
    assert rewound.restore(fresh(), step=5).step == 5
    assert not rewound.save(filled(1, 5))
    with pytest.raises(ValueError, match="holds step 9"):
        rewound.save(filled(3, 7))
    assert same(rewound.restore(fresh()).state, filled(2, 9))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep must be an int of at least 1; got 0"):
        RunCheckpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="mode must be 'min' or 'max'; got 'best'"):
        RunCheckpoints(tmp_path, mode="best")
    with pytest.raises(TypeError, match=r"config.f is <built-in function print>"):
        RunCheckpoints(tmp_path, config={"f": print})
    with pytest.raises(TypeError, match=r"data\[1\].ids is array"):
        RunCheckpoints(tmp_path).save(fresh(), [1, {"ids": np.arange(2)}])
    assert not list(tmp_path.iterdir())


def test_what_json_would_change_is_refused():
    for value in (float("inf"), {1: 2}, b"x", {1, 2}):
        with pytest.raises(TypeError, match="data is"):
            record.plain("data", value)
    assert record.plain("data", jnp.asarray(3)) == 3


def test_a_newer_format_asks_for_an_upgrade(tmp_path, monkeypatch):
    with RunCheckpoints(tmp_path) as run:
        run.save(filled(1, 6))
        run.wait()
        monkeypatch.setattr(record, "FORMAT", 3)
        run.save(filled(1, 7))
        run.wait()
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"7.* has format 3, .*upgrade lorax"):
            run.restore(fresh())
