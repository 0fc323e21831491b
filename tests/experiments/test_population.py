"""The population option, end to end at toy size, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from configs import quickstart
from experiments.recipes import byte_model, members
from experiments.trainer import metric_log
from lorax import checkpoint

pytestmark = pytest.mark.once

GIVEN = {
    "seed": (3, 0),
    "rank": (2, 4),
    "alpha": (4, 16.0),
    "learning_rate": (1e-3, 1e-2),
}


def config_of(**given):
    config = quickstart.get_config("runlocal")
    config.population.update(given)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A population of two, then its second member in its own run."""
    folder = tmp_path_factory.mktemp("population")
    config = config_of(**GIVEN)
    config.run.cache_dir = str(folder / "cache")
    results = members.train(config, str(folder / "both"))
    config.run.methods, config.adapter.rank = ("lora",), 4
    alone = byte_model.train(config, str(folder / "alone"))
    return folder, results, alone


def test_a_member_is_the_run_of_its_own(run):
    folder, results, alone = run
    mine = results["members"][1]
    assert (mine["seed"], mine["rank"], mine["skipped"]) == (0, 4, 0)
    assert mine["trainable"] == alone["lora"]["trainable"]
    np.testing.assert_allclose(mine["test_bpb"], alone["lora"]["test_bpb"], rtol=1e-5)
    np.testing.assert_allclose(
        results["base"]["test_bpb"], alone["base"]["test_bpb"], rtol=1e-6
    )
    both = [folder / "both" / "members" / "1", folder / "alone" / "adapter"]
    ours, theirs = map(checkpoint.load_adapters, both)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    # Relative to the whole tree: where a gradient is pure rounding, Adam still makes a
    # step of it (in float64 members are exact: tests/test_population.py).
    norm = np.sqrt(sum(np.sum(np.square(y)) for y in jax.tree.leaves(theirs)))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * norm)


def test_everything_is_written_a_row_a_member(run):
    folder, results, _ = run
    assert json.loads((folder / "both" / "results.json").read_text()) == results
    assert len(results["members"]) == 2 and results["step_ms"] > 0
    for name, values in GIVEN.items():
        assert tuple(row[name] for row in results["members"]) == values
    assert results["members"][0]["test_bpb"] != results["members"][1]["test_bpb"]
    lines = metric_log.read(folder / "both")
    losses = [r["loss"] for r in lines if r["run"] == "member_0" and "loss" in r]
    assert len(losses) == 2  # 4 steps, reported every 2
    first = checkpoint.load_adapters(folder / "both" / "members" / "0")
    assert first["head/kernel"].rank == 2 and first["head/kernel"].scale == 2.0
    table = members.table(results)
    assert table.row_count == 2 and "Base: " in table.caption
    headers = lambda table: [column.header for column in table.columns]
    assert "steps\nskipped" not in headers(table)
    results["members"][0] |= {"skipped": 4}
    table = members.table(results)
    assert headers(table)[-1] == "steps\nskipped"
    assert list(table.columns[-1].cells) == ["4", "0"]


def test_a_population_is_trained_where_there_is_one(monkeypatch):
    for name in ("train", "train_methods"):
        monkeypatch.setattr(members, name, lambda *args, name=name: (name, *args))
    for config, name in [
        (config_of(), "train_methods"),
        (config_of(rank=(1,)), "train"),
    ]:
        assert members.run(config, "runs/x") == (name, config, "runs/x")


def test_empty_fields_take_the_configs_own_values():
    assert members.members(config_of()) == []
    made = members.members(config_of(rank=(1, 2, 3)))
    assert [m.rank for m in made] == [1, 2, 3]
    assert {(m.seed, m.learning_rate, m.alpha) for m in made} == {(0, 1e-2, 16.0)}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"rank": (1, 2), "seed": (0, 1, 2)},
            r"\{'rank': 2, 'seed': 3\}.*the same len",
        ),
        ({"rank": (1.5, 2)}, r"population.rank=\(1.5, 2\); give a tuple of whole"),
        ({"rank": (0, 2)}, r"population.rank=\(0, 2\)"),
        (
            {"learning_rate": (1e-3, -1.0)},
            "learning_rate=.*a tuple of positive numbers",
        ),
        ({"alpha": ("16",)}, r"population.alpha=\('16',\)"),
    ],
)
def test_bad_values_say_what_to_do(given, told):
    with pytest.raises(ValueError, match=told):
        members.members(config_of(**given))


def test_an_unknown_field_is_named():
    config = config_of()
    with config.unlocked():
        config.population.width = (8, 16)
    with pytest.raises(
        ValueError, match="population.width: members differ in seed, le"
    ):
        members.members(config)


def test_an_init_that_moves_the_base_is_refused(monkeypatch):
    config = config_of(rank=(1, 2))
    moved = lambda key, base, targets, kernels: ({}, {**base})
    monkeypatch.setattr(members.lorax, "init", moved)
    with pytest.raises(ValueError, match="members share one base: use init='standard'"):
        members.start(config, jax.random.key(0), members.members(config)[0], {}, {})
