"""A run's page shows every file of the folder, in figures or words."""

import json
import re
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import ml_collections
import pytest

import lorax
from experiments.machine import record
from experiments.pages import run_page
from experiments.reading import command
from experiments.trainer import metric_log
from lorax import checkpoint

pytestmark = pytest.mark.once


@pytest.fixture
def base():
    return {f"h_{i}": {"q": {"kernel": jnp.ones((6, 5))}} for i in range(2)}


@pytest.fixture
def run(tmp_path, base):
    """The folder of a run that trained two kernels with AdaLoRA."""
    folder = tmp_path / "mine"
    with metric_log.Writer(folder) as log:
        for step in (1, 2, 3):
            log.write("lora", step, {"loss": 3.0 / step, "grad_norm": 1.0})
            log.write("full", step, {"loss": 2.0 / step, "grad_norm": 1.0})
    (folder / "results.json").write_text(
        json.dumps({"lora": {"test_bpb": 1.23456789, "trainable": 12345}})
    )
    target = lorax.Target(".*", rank=3, adapter="adalora")
    adapters, _ = lorax.init(jax.random.key(0), base, [target])
    kept = {"h_0/q/kernel": [2.0, 1.0, 0.0], "h_1/q/kernel": [1.0, 0.0, 0.0]}
    trained = {p: a.replace(lam=jnp.array(kept[p])) for p, a in adapters.items()}
    checkpoint.save_adapters(folder / "adapter", trained)
    return folder


def figures(page):
    """The texts of every figure, which must be valid XML."""
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    return [xml.etree.ElementTree.fromstring(figure) for figure in found]


def test_a_page_has_results_curves_ranks_and_config(run):
    page = run_page.write(run).read_text()
    assert len(figures(page)) == 5  # loss, norm; spectra, ranks, and those kept
    for told in ("12,345", "1.2346", "<h2>Updates: adapter</h2>", "lora.test_bpb"):
        assert told in page
    assert "run.json is missing" in page and "http" not in re.sub(
        r"<svg.*?</svg>", "", page, flags=re.DOTALL
    )


def test_the_record_of_a_run_is_on_its_page(run, monkeypatch):
    config = ml_collections.ConfigDict({"run": {"steps": 3}, "a": (1, 2)})
    monkeypatch.setattr("sys.argv", ["x", "--config=<mine>"])
    record.write(run, config)
    told = json.loads((run / "run.json").read_text())
    assert told["config"] == {"run": {"steps": 3}, "a": [1, 2]}
    assert told["versions"]["jax"] == jax.__version__
    assert re.fullmatch(r"[0-9a-f]{40}\+?|None", str(told["commit"]["lorax"]))
    page = run_page.write(run).read_text()
    assert "run.steps = 3" in page and "--config=&lt;mine&gt;" in page


def test_adapters_without_factors_are_said_to_have_none(run, base):
    adapters, params = lorax.init(
        jax.random.key(0), base, [lorax.Target(".*", adapter="full")]
    )
    del params
    checkpoint.save_adapters(run / "members" / "0", adapters)
    page = run_page.write(run).read_text()
    assert "Updates: member 0" in page and "singular_values" in page


def test_what_is_not_a_run_is_refused(run):
    with pytest.raises(FileNotFoundError, match="there are runs below it: mine"):
        run_page.write(run.parent)
    (run / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json cannot be read"):
        run_page.write(run)
    with pytest.raises(SystemExit, match="no metrics.jsonl"), command.refusing():
        run_page.write(run / "adapter")
