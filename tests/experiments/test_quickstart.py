"""The quickstart end to end at toy size: cold, then with a cached base."""

import json

import jax
import numpy as np
import pytest

from configs import quickstart
from experiments.recipes import byte_model, pretrain
from experiments.trainer import metric_log
from lorax import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two runs of the toy config that share a cache."""
    folder = tmp_path_factory.mktemp("quickstart")
    config = quickstart.get_config("runlocal")
    config.run.cache_dir = str(folder / "cache")
    config.lock()
    results = [
        byte_model.train(config, str(folder / name)) for name in ("cold", "cached")
    ]
    return folder, config, results


def test_every_artefact_is_there(run):
    folder, _, (results, _) = run
    for name in ("curves.svg", "curves-dark.svg"):
        drawn = (folder / "cold" / name).read_text()
        assert 'id="legend_1"' in drawn and len(drawn) > 10_000
    assert json.loads((folder / "cold" / "results.json").read_text()) == results
    assert list((folder / "cold" / "tensorboard").glob("lora/events*"))
    runs = {row["run"] for row in metric_log.read(folder / "cold")}
    assert {"pretrain", "lora", "full", "final_base", "final_lora"} <= runs


def test_results_are_those_of_the_models(run):
    _, config, (results, _) = run
    assert list(results) == ["base", "lora", "full"]
    assert all(
        0 < r["test_bpb"] < 9 and 0 < r["source_bpb"] < 9 for r in results.values()
    )
    assert results["full"]["recovered"] == 1.0
    assert results["full"]["trainable_share"] == 1.0
    c, rank = config.model, config.adapter.rank
    layer = 4 * 2 * c.width + 2 * (c.width + c.hidden)  # q, k, v, o; up, down
    low_rank = rank * (c.layers * layer + c.width + c.vocabulary)  # and the head
    norms = (2 * c.layers + 1) * c.width
    assert results["lora"]["trainable"] == low_rank + norms
    # Adam keeps two moments of every trained leaf, and a few counts.
    moments = 8 * results["lora"]["trainable"]
    assert moments <= results["lora"]["opt_state_bytes"] <= moments + 64


def test_the_cached_base_gives_the_same_results(run):
    folder, _, (cold, cached) = run
    assert "pretrain" not in {row["run"] for row in metric_log.read(folder / "cached")}
    for name in cold:
        np.testing.assert_allclose(
            cold[name]["test_bpb"], cached[name]["test_bpb"], rtol=1e-5
        )


def test_the_adapter_is_read_back_without_a_template(run):
    folder, _, (results, _) = run
    adapters = checkpoint.load_adapters(folder / "cold" / "adapter")
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert trained == results["lora"]["trainable"]
    assert "layers/attn/q/kernel" in adapters


def test_fingerprint_covers_what_makes_the_base_and_nothing_else(run):
    _, config, _ = run
    same, other = (
        config.copy_and_resolve_references(),
        quickstart.get_config("runlocal"),
    )
    with same.unlocked():
        same.adapter.rank, same.run.cache_dir = 2, "elsewhere"
    assert pretrain.fingerprint(same) == pretrain.fingerprint(config)
    other.model.pretrain.steps += 1
    assert pretrain.fingerprint(other) != pretrain.fingerprint(config)


@pytest.mark.once
def test_a_broken_cache_is_trained_anew(run, tmp_path, caplog):
    folder, config, (cold, _) = run
    (path,) = (folder / "cache").glob("base-*.safetensors")
    assert not list((folder / "cache").glob("*.partial"))
    broken = tmp_path / path.name
    broken.write_bytes(path.read_bytes()[:1000])
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.run.cache_dir, config.run.methods = str(tmp_path), ("lora",)
    results = byte_model.train(config, str(tmp_path / "run"))
    assert "recovered" not in results["lora"]
    assert broken.read_bytes() == path.read_bytes()
    np.testing.assert_allclose(results["base"]["test_bpb"], cold["base"]["test_bpb"])


@pytest.mark.once
@pytest.mark.parametrize(
    "adapter,init,options",
    [
        pytest.param("dora", "lora_ga", (("scale", "gd"),), marks=pytest.mark.slow),
        ("adalora", "pissa", ()),
    ],
)
def test_other_adapters_and_inits_by_config_alone(
    run, tmp_path, adapter, init, options
):
    folder, given, _ = run
    config = given.copy_and_resolve_references()
    config.run.cache_dir, config.run.methods = str(folder / "cache"), ("lora",)
    config.adapter.adapter, config.adapter.init = adapter, init
    config.adapter.options, config.adapter.calibration_batches = options, 1
    results = byte_model.train(config, str(tmp_path))
    assert 0 < results["lora"]["test_bpb"] < 9
    made = checkpoint.load_adapters(tmp_path / "adapter")["head/kernel"]
    assert type(made).__name__.lower() == adapter
