"""The study's wiring at toy size; its numbers come from the command."""

import json

import jax
import pytest

from experiments.studies import quickstart_optimizers as study
from experiments.trainer import objects

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", study.METHODS)
def test_every_method_is_one_of_the_config(name):
    config = study.configured(study.METHODS[name], toy=True, steps=4)
    assert config.run.steps == 4
    assert config.adapter.init == study.METHODS[name].init


def test_a_method_is_swept_reported_and_read_back(tmp_path):
    method = study.METHODS["LoRA-GA + LoRA-Pro, factor"]
    config = study.configured(method, toy=True, steps=2)
    model = objects.make_model(config.model)
    loss_fn = objects.make_loss(model)
    tokens = jax.numpy.zeros((1, 8), int)
    base = model.init(jax.random.key(0), tokens)["params"]
    found = study.study(method, loss_fn, base, config, seeds=2, every=1)
    grid = {float(rate): bits for rate, bits in found["grid"].items()}
    best = min(grid, key=grid.get)
    assert best == pytest.approx(found["rate"], rel=1e-2)
    assert len(grid) == study.MOST or min(grid) < best < max(grid)
    assert [len(curve) for curve in found["curves"]] == [2, 2]
    path = tmp_path / "x.json"
    assert study._read(path, [1]) is None
    path.write_text(json.dumps({"settings": [1], **found}))
    assert study._read(path, [1])["curves"] == found["curves"]
    assert study._read(path, [2]) is None
