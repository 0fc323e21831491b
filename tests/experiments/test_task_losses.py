"""The tasks' losses: equal in chunks and all at once, and when chunks are used."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gpt2_e2e_lora
from experiments.reading import fields
from experiments.tasks import losses, text_to_text
from lorax.models import experts, gpt2, layers, mixture, t5
from tests import programs

SIZES = {"vocabulary": 40, "width": 16, "layers": 1, "heads": 2, "hidden": 24}
ROWS, TIME = 3, 7


def batch_of():
    draw = np.random.default_rng(0)
    tokens = lambda: jnp.asarray(draw.integers(2, 40, (ROWS, TIME)))
    return {
        "inputs": tokens(),
        "targets": tokens(),
        "weights": jnp.asarray(draw.integers(0, 2, (ROWS, TIME)), jnp.float32),
        "bytes": jnp.arange(ROWS),
        "real": jnp.ones((ROWS, TIME), bool),
    }


CASES = {
    "causal": (gpt2.Model(gpt2.Config(**SIZES, positions=8)), losses.make_causal),
    "text to text": (t5.Model(t5.Config(**SIZES, head_dim=8)), text_to_text.make_loss),
}


@pytest.mark.parametrize("name", CASES)
def test_chunks_give_what_all_logits_give(name):
    (model, make), batch = CASES[name], batch_of()
    read = (batch["inputs"],) * (1 if name == "causal" else 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *read)
    params = programs.filled(shapes)["params"]
    one, other = (
        jax.jit(jax.value_and_grad(make(model, 0.1, chunk), has_aux=True))(
            params, batch
        )
        for chunk in (0, 3)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        scale = np.abs(np.asarray(a)).max()
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * scale)


def test_chunks_are_chosen_where_logits_are_large():
    config = gpt2.Config()  # a vocabulary of 50,257
    assert losses.chunk_for((8, 128), config) == 0
    assert losses.chunk_for((8, 512), config) == 128  # of 1,024 tokens


def test_a_config_says_how_many_positions():
    config = gpt2_e2e_lora.get_config("runlocal")
    assert config.run.loss_chunk == losses.AUTO
    with config.unlocked():
        config.run.loss_chunk = 256
        fields.require(config)
        config.run.loss_chunk = -2
    said = "config.run.loss_chunk.*-2"
    with pytest.raises(ValueError, match=said) as error:
        fields.require(config)
    assert re.search("-1 to choose it from the sizes", str(error.value))


@pytest.mark.once
@pytest.mark.parametrize("chunk", [0, 3])
def test_routers_add_their_losses(chunk):
    """On all tokens up to the last with a weight; -1 means the model's config."""
    config = mixture.Config(
        vocabulary=40,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=8,
        hidden=12,
        experts=4,
        balance=0.25,
    )
    model, batch = mixture.Model(config), batch_of()
    batch["weights"] = batch["weights"].at[:, -2:].set(0).at[:, 0].set(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["inputs"])
    params = programs.filled(shapes)["params"]
    _, kept = model.apply({"params": params}, batch["inputs"], mutable=[layers.ROUTING])
    logits = experts.recorded(kept[layers.ROUTING])
    last = [np.flatnonzero(row).max() for row in batch["weights"]]
    real = np.arange(TIME) <= np.array(last)[:, None]
    added = 0.25 * experts.balance_loss(logits, 2, real)
    added += 0.5 * experts.z_loss(logits, real)
    plain, told = losses.make_causal(model, 0.1, chunk)(params, batch)
    own = losses.Routers(balance=losses.AUTO, z=0.5)
    found, same = losses.make_causal(model, 0.1, chunk, own)(params, batch)
    assert float(found) == pytest.approx(float(plain + added), rel=1e-5)
    assert float(added) > 0.1
    jax.tree.map(np.testing.assert_array_equal, same, told)


def test_a_model_without_routers_refuses_their_weights():
    with pytest.raises(ValueError, match="router_loss=-1.*the model has no routers"):
        losses.make_causal(CASES["causal"][0], routers=losses.Routers(losses.AUTO))
