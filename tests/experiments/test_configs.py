"""Every config builds, and refuses unknown fields."""

import importlib
import pathlib

import pytest

from configs import common
from experiments.trainer import objects

FILES = sorted(
    p.stem
    for p in pathlib.Path(common.__file__).parent.glob("*.py")
    if p.stem not in ("__init__", "common")
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("arg", ["", "runlocal"])
def test_config_builds_and_is_locked(name, arg):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    assert set(config) == set(common.SECTIONS)
    with pytest.raises(AttributeError, match="rnak"):
        config.adapter.rnak = 4
    if "source" not in config.model:  # a checkpoint's own config gives the rest
        objects.make_model(config.model)
    for method in config.run.methods:
        assert objects.make_targets(method, config.adapter)
        assert config.optimizer.learning_rate[method] > 0


def test_argument_language():
    parse = lambda arg: common.parse_arg(arg, runlocal=False, rank=8, lr=1e-3)
    assert parse(None) == {"runlocal": False, "rank": 8, "lr": 1e-3}
    assert parse("runlocal,lr=0.1") == {"runlocal": True, "rank": 8, "lr": 0.1}
    assert parse("runlocal=false")["runlocal"] is False
    with pytest.raises(ValueError, match="'rnak' is not an argument of this config"):
        parse("rnak=4")
    with pytest.raises(ValueError, match="give a value of type int"):
        parse("rank=many")
    with pytest.raises(ValueError, match="give true or false"):
        parse("runlocal=maybe")


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="'prefix' is not one of lora, full"):
        objects.make_targets("prefix", common.sections().adapter)
