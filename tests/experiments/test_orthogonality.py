"""The study of AdaLoRA's penalties: its wiring at toy size."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from experiments.studies import orthogonality as study
from experiments.studies.method import comparison

pytestmark = pytest.mark.once


def test_every_arm_is_chosen_reported_and_resumed(tmp_path, monkeypatch):
    arms = {"LoRA": study.Arm("lora"), "none": study.Arm(std=0.0, lam_rate=2.0)}
    settings = {"toy": (study.Setting(30, low_rank=True, falls=True), arms)}
    for name, value in {
        "WIDTH": 8,
        "BATCH": 16,
        "HELD_OUT": 32,
        "RANK": 2,
        "GRID": (0.02, 0.04),
        "CHOOSE": (100, 101),
        "REPORT": (0, 1, 2, 3),
        "SETTINGS": settings,
    }.items():
        monkeypatch.setattr(study, name, value)
    study.make_run.cache_clear()
    digests = {arm: study.digest(own) for arm, own in arms.items()}
    path = tmp_path / "runs.jsonl"
    runs = comparison.Runs(path, digests)
    found = {arm: study.study("toy", arm, runs) for arm in arms}
    study.make_run.cache_clear()
    for own in found.values():
        assert len(own["final"]) == len(own["flat"]) == 4
        assert 0 < np.mean(own["final"]) < 0.9  # it learns
        assert f"{own['rate']:.3g}" == min(own["grid"], key=own["grid"].get)
    assert found["LoRA"]["distance"] == [0, 0] and min(found["none"]["distance"]) > 0
    assert "| none |" in study.table(found)
    lines = path.read_text().splitlines()
    assert all(json.loads(line)["seconds"] >= 0 for line in lines)
    again = comparison.Runs(path, digests, minutes=0)  # nothing may be rerun
    assert study.study("toy", "none", again) == found["none"]
    with pytest.raises(comparison.NotRun):
        study.study("toy", "none", comparison.Runs(path, {"none": "other"}, minutes=0))


def test_what_is_measured_by_hand():
    axes = lorax.Axes((0,), (1,))
    own = lorax.AdaLora(
        2 * jnp.eye(6, study.RANK),
        jnp.ones(study.RANK),
        jnp.eye(study.RANK, 5),
        1.0,
        axes,
    )
    # |4 I - I| = 3 sqrt(rank)
    p, q = study.distances({"w": own})
    np.testing.assert_allclose([p, q], [3 * study.RANK**0.5, 0], atol=1e-6)
    update = np.diag([4.0, 3.0, 2.0, 1.0, 0.5])
    got = study.flatness({"w": jnp.asarray(update)}, {"w": jnp.zeros((5, 5))})
    np.testing.assert_allclose(got, 0.25, rtol=1e-6)
