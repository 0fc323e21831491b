"""A third-party package joins by its name in a config, and nothing else."""

import json
import re
import subprocess
import sys

import numpy as np
import optax
import pytest

from experiments.reading import checking, plugins
from experiments.recipes import byte_model
from experiments.search import runs
from experiments.trainer import metrics, optimizers
from lorax import adapters as adapter_classes
from lorax import checkpoint
from tests import children
from tests.plugin import config as configs
from tests.plugin import methods


def launch(*args):
    command = [sys.executable, "-m", "experiments.sweep", *args]
    env = children.environment()
    return subprocess.run(
        command, cwd=children.ROOT, env=env, capture_output=True, text=True, check=False
    )


def test_nothing_of_ours_knows_the_package_and_it_knows_nothing_private():
    words = re.compile(r"walsh|signum|tests.plugin|['\"]cosines", re.I)
    for folder in ("lorax", "experiments", "configs"):
        for path in (children.ROOT / folder).rglob("*.py"):
            assert not words.search(path.read_text()), path
    private = re.compile(r"(from|import) lorax\S*(\._| import _)")
    for path in (children.ROOT / "tests" / "plugin").glob("*.py"):
        assert not private.search(path.read_text()), path


def test_names_of_the_package_are_checked_like_ours():
    config = configs.get_config()
    checking.check(config)
    with pytest.raises(AttributeError):
        config.optimizer.momentun = 0.5  # locked
    with config.unlocked():
        config.optimizer.momentun = 0.5
    with pytest.raises(ValueError, match="signum' has no option 'momentun'; it has"):
        checking.check(config)
    config = configs.get_config()
    config.optimizer.name = "adamw"
    with pytest.raises(ValueError, match="unexpected keyword argument 'momentum'"):
        checking.check(config)
    config.optimizer.name, config.optimizer.chain = "chain", (("adam", {}),)
    with pytest.raises(ValueError, match="optimizer.momentum=0.8: the links of a"):
        checking.check(config)
    config = configs.get_config()
    config.adapter.options = (("size", 4),)
    with pytest.raises(ValueError, match="adapter='walsh' has no option size"):
        checking.check(config)


def test_a_module_that_does_not_import_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks_here.py").write_text("import no_such_thing\n")
    (tmp_path / "divides_here.py").write_text("1 / 0\n")
    config = configs.get_config()
    config.run.plugins = ("no_such_package.methods",)
    with pytest.raises(ValueError, match=r"plugins: no module 'no_such_pack"):
        checking.check(config)
    config.run.plugins = ("breaks_here",)
    with pytest.raises(RuntimeError, match="'breaks_here' failed: Module.*no_such"):
        checking.check(config)
    with pytest.raises(RuntimeError, match="importing 'divides_here' failed: Zero"):
        plugins.import_all(["divides_here"], "--plugins")
    config.run.plugins = ("tests.plugin.methods", "")
    with pytest.raises(ValueError, match=r"run.plugins=.*\('my_package.methods',"):
        checking.check(config)


def test_a_name_of_an_optimiser_is_one_functions():
    other = lambda learning_rate: optax.sgd(learning_rate)
    for name, told in (
        ("adamw", "experiments.trainer.optimizers._adamw"),
        ("chain", "chains"),
    ):
        with pytest.raises(ValueError, match=f"{name!r} belongs to {told}.*under"):
            optimizers.register(name, other)
    assert optimizers.register("signum")(methods.signum) is methods.signum


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep over alpha by the package's adapter and optimiser: one population."""
    folder = tmp_path_factory.mktemp("plugin")
    done = launch(
        "--config=tests/plugin/config.py",
        f"--config.run.cache_dir={folder / 'cache'}",
        "--config.eval.source_bytes=256",
        "--grid=adapter.alpha=4.0,16.0",
        f"--workdir={folder / 'sweep'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.once
def test_a_sweep_trains_a_population_and_reports_it(swept):
    folder, printed = swept
    assert "population of 2" in printed
    table = (folder / "sweep" / "table.md").read_text()
    assert table in printed and "#0 of 2" in table and "#1 of 2" in table
    lines = runs.RunTable(folder / "sweep").lines
    assert [line["fields"]["adapter.alpha"] for line in lines] == [4.0, 16.0]
    values = [line["results"]["lora"]["test_bpb"] for line in lines]
    assert np.isfinite(values).all() and values[0] != values[1]


@pytest.mark.once
def test_a_run_by_config_is_the_member_and_loads_with_its_frozen_arrays(swept):
    folder, _ = swept
    config = configs.get_config()
    config.run.cache_dir, config.eval.source_bytes = str(folder / "cache"), 256
    results = byte_model.train(config, str(folder / "alone"))
    member = runs.RunTable(folder / "sweep").lines[1]["results"]  # alpha 16
    np.testing.assert_allclose(
        results["lora"]["test_bpb"], member["lora"]["test_bpb"], rtol=1e-5
    )
    assert results["lora"]["test_bpb"] != results["base"]["test_bpb"]
    saved = folder / "alone" / "adapter"
    adapters = checkpoint.load_adapters(saved)
    frozen = checkpoint.load_frozen(saved)
    walsh = {p: a for p, a in adapters.items() if isinstance(a, methods.Walsh)}
    assert {name for a in walsh.values() for _, name in a.lent} == set(frozen)
    assert metrics.size(adapters) == results["lora"]["trainable"]


@pytest.mark.slow
def test_an_init_of_the_package_by_config(swept):
    folder, _ = swept
    config = configs.get_config()
    config.run.cache_dir, config.eval.source_bytes = str(folder / "cache"), 256
    config.adapter.adapter, config.adapter.init = "lora", "cosines"
    results = byte_model.train(config, str(folder / "cosines"))
    assert np.isfinite(results["lora"]["test_bpb"])
    other = config.copy_and_resolve_references()
    other.adapter.init = "standard"
    standard = byte_model.train(other, str(folder / "standard"))
    assert results["lora"]["test_bpb"] != standard["lora"]["test_bpb"]


@pytest.mark.once
def test_a_file_of_a_class_that_is_not_registered_says_what_to_import(
    swept, monkeypatch
):
    saved = sorted((swept[0] / "sweep").glob("*/members/0"))[0]
    assert json.loads((saved / "adapters.json").read_text())["frozen"]
    monkeypatch.delitem(adapter_classes.REGISTRY, "walsh")
    with pytest.raises(ValueError, match="'walsh' is not reg.*import tests.plugin.wa"):
        checkpoint.load_adapters(saved)
