"""EVA's ranks from a config: the same sum, more where components explain most."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

import lorax
from configs import gpt2_e2e_lora
from experiments.trainer import fit, objects, prepare, progress
from tests import programs

PARAMS = {"even": programs.normal(0, 8, 8), "steep": programs.normal(1, 8, 8)}
STEEP = 0.1 ** np.arange(8)  # one component explains nearly all


def loss_fn(params, x):
    y = x @ params["even"] + (x * STEEP) @ params["steep"]
    return jnp.mean(jnp.tanh(y) ** 2), {}


def test_a_run_moves_ranks_where_its_config_says_so():
    config = gpt2_e2e_lora.get_config()
    config.adapter.update(rank=2, patterns=("even", "steep"), init="eva")
    config.adapter.calibration_batches = 2
    config.run.steps = config.run.log_every = 1
    rows = [np.asarray(programs.normal(i, 32, 8)) for i in range(2)]
    ranks = {}
    for rho in (1.0, 2.0):
        config.adapter.redistribute = rho
        batches = grain.MapDataset.source(rows)
        targets = objects.make_targets("lora", config.adapter)
        prepared = prepare.prepare(
            jax.random.key(0),
            prepare.Problem(loss_fn, PARAMS, targets, optax.sgd(0.1), batches),
            calibration=prepare.calibration_of(config.adapter),
        )
        with progress.bars(rich.console.Console(quiet=True)) as bars:
            output = fit.Output("lora", bars)
            done = fit.fit(prepared, batches, fit.schedule_of(config), output)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, done.params, PARAMS))
        ranks[rho] = {path: a.rank for path, a in done.adapters.items()}
        assert lorax.merge(done.adapters, done.params)["even"].shape == (8, 8)
    assert ranks == {1.0: {"even": 2, "steep": 2}, 2.0: {"even": 3, "steep": 1}}
