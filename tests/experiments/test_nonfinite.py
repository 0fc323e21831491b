"""Non-finite steps: counted, skipped, and finally an error with its batch."""

from __future__ import annotations

import math

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import rich.console

import lorax
from experiments.trainer import fit, keeping, prepare, progress
from experiments.trainer.nonfinite import Guard, NonFiniteError, save_batch
from lorax import checkpoint, training
from lorax.adapters import Full


def watch_all(guard, losses, **more):
    for step, loss in enumerate(losses):
        guard.watch(step, {"x": np.full(2, step)}, {"loss": loss, **more})
    guard.finish()


def test_so_many_in_a_row_and_no_more(tmp_path):
    nan = math.nan
    watch_all(Guard(tmp_path, 2), [nan, nan, 1.0, nan, math.inf, 1.0])
    assert not list(tmp_path.iterdir())
    told = r"step 4 is not finite \(loss nan\), the last of 3 in a row where 2 may be"
    with pytest.raises(NonFiniteError, match=told):
        watch_all(Guard(tmp_path, 2), [1.0, 1.0, nan, nan, nan, 1.0, 1.0])
    with np.load(tmp_path / "nonfinite-step-4.npz", allow_pickle=False) as saved:
        assert list(saved) == ["batch/x"]
        np.testing.assert_array_equal(saved["batch/x"], [4, 4])


def test_the_last_step_is_looked_at_as_well(tmp_path):
    guard = Guard(tmp_path / "new" / "folder", 0)
    guard.watch(7, np.arange(3), {"loss": 1.0, "grad_norm": math.inf})
    with pytest.raises(NonFiniteError, match=r"step 7 .*loss 1, grad_norm inf"):
        guard.finish()
    saved = np.load(tmp_path / "new/folder/nonfinite-step-7.npz", allow_pickle=False)
    np.testing.assert_array_equal(saved["batch"], [0, 1, 2])
    guard.finish()  # nothing is left to check


def test_a_batch_without_targets_is_no_fault(tmp_path):
    watch_all(Guard(tmp_path, 0), [math.nan, math.nan], weight=jnp.zeros(()))


def test_with_the_train_step(tmp_path):
    """The state is kept, whether the loss is bad or only the model's statistics."""

    def loss_fn(params, model_state, batch, key):
        hidden = {"mean": jnp.sum(batch)}
        return jnp.sum(params["w"] * jax.nn.relu(batch[0])), ({}, hidden)

    tx = optax.sgd(0.1)
    state = training.create_state(
        jax.random.key(0), {"w": Full(jnp.ones(()))}, tx, {"mean": jnp.zeros(())}
    )
    step = jax.jit(training.make_train_step(loss_fn, tx), donate_argnums=0)
    params, guard = {"w": jnp.ones(())}, Guard(tmp_path, 1)
    batches = [[1.0, 1.0], [jnp.nan, 1.0], [1.0, jnp.nan], [1.0, 1.0]]
    with pytest.raises(NonFiniteError, match="step 2 .*the last of 2 in a row"):
        for i, batch in enumerate(batches):
            state, metrics = step(state, params, jnp.asarray(batch))
            if i == 0:
                after_one = float(state.adapters["w"].value)
            if i == 2:
                assert np.isfinite(metrics["loss"]) and state.skipped == 2
                assert float(state.adapters["w"].value) == after_one
            guard.watch(i, np.asarray(batch), metrics)
    assert after_one == pytest.approx(0.9)


def test_a_first_step_counts_and_a_run_that_goes_on_does_not_count_twice(tmp_path):
    """A step with a good loss and a bad update shows only in the count."""
    bad = {"loss": 1.0, "grad_norm": 2.0, "skipped": 3}
    told = (
        r"step 5 .*\(loss 1, grad_norm 2, but the adapters, the optimiser's state or "
        r"the model's would not be\), the last of 1 .*schedule at that step.*epsilon"
    )
    for skipped in (0, 2):
        guard = Guard(tmp_path, 0)
        guard.start(skipped)
        guard.watch(5, np.ones(1), bad)
        with pytest.raises(NonFiniteError, match=told):
            guard.finish()
    guard = Guard(tmp_path, 0)
    guard.start(3)
    guard.watch(5, np.ones(1), bad)
    guard.finish()
    assert guard.in_a_row == 0


def test_a_rate_that_is_inf_stops_the_run_and_spoils_no_checkpoint(tmp_path):
    """With a good gradient and a NaN update, nothing that is kept is NaN."""
    rate = lambda count: jnp.where(count == 2, jnp.inf, 0.1)
    loss_fn = lambda params, x: (jnp.mean((x @ params["w"] - 1) ** 2), {})
    config = ml_collections.ConfigDict(
        {
            "run": {"steps": 6, "save_every": 1, "save_keep": 2, "save_deadline": 9.0},
            "model": {"source": "drawn"},
        }
    )
    params = {"w": jax.random.normal(jax.random.key(1), (3, 2))}

    def run():
        with progress.bars(rich.console.Console(quiet=True)) as bars:
            rows = grain.MapDataset.source([np.ones((4, 3), np.float32)] * 6)
            targets = [lorax.Target("w", rank=1)]
            keep = keeping.Keep(tmp_path / "checkpoints", config)
            problem = prepare.Problem(loss_fn, params, targets, optax.adam(rate), rows)
            fit.fit(
                prepare.prepare(jax.random.key(0), problem),
                rows,
                fit.Schedule(6, log_every=6),
                fit.Output("lora", bars),
                keep=keep,
                guard=Guard(tmp_path, 1),
            )

    with pytest.raises(NonFiniteError, match=r"step 4 .*but the adapters.*of 2 in a"):
        run()
    leaves = []
    with checkpoint.RunCheckpoints(tmp_path / "checkpoints") as kept:
        assert len(kept.steps()) == 2
        adapters, _ = lorax.init(jax.random.key(0), params, lorax.Target("w", rank=1))
        fresh = training.create_state(jax.random.key(0), adapters, optax.adam(rate))
        for step in kept.steps():
            state = kept.restore(fresh, step=step).state
            assert int(state.step) - int(state.skipped) == 2
            leaves += jax.tree.leaves((state.adapters, state.opt_state))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    with pytest.raises(NonFiniteError, match="of 2 in a row"):  # resumed
        run()


def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NonFiniteError, match=r"step 0 .*batch could not be written"):
        watch_all(Guard(tmp_path / "file", 0), [math.nan])


def test_what_numpy_lacks_is_widened(tmp_path):
    batch = {
        "half": jnp.asarray([1.5, -2.0], jnp.bfloat16),
        "small": jnp.asarray([3, -4], jnp.int4),
        "file": [jax.random.key(9), "text", np.array(["a", None], object)],
    }
    save_batch(tmp_path / "batch.npz", batch)
    with np.load(tmp_path / "batch.npz", allow_pickle=False) as saved:
        found = {name: (saved[name].dtype.name, saved[name].tolist()) for name in saved}
    assert found == {
        "batch/file/0": ("uint32", [0, 9]),
        "batch/file/1": ("str128", "text"),
        "batch/file/2": ("str128", ["a", "None"]),
        "batch/half": ("float32", [1.5, -2.0]),
        "batch/small": ("int32", [3, -4]),
    }


def test_bad_arguments(tmp_path):
    for limit in (-1, 1.0, True):
        with pytest.raises(ValueError, match="limit must be an int of at least 0; got"):
            Guard(tmp_path, limit)
