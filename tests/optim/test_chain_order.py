"""Links that read gradients must come before the moments; `create_state` checks."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lorax
from lorax import optim, training

ADAPTERS = {
    "w": lorax.Lora(jnp.ones((3, 2)), jnp.ones((2, 4)), 1.0, lorax.Axes((0,), (1,)))
}
READERS = [optim.scale_by_lora_pro, optim.scale_by_gram, optim.scale_by_lora_fa]
MOMENTS = {
    "ScaleByAdamState": optax.scale_by_adam,
    "TraceState": lambda: optax.trace(0.9),
    "ScaleByRmsState": optax.scale_by_rms,
    "ScaleByMuonFactorsState": optim.scale_by_muon_factors,
}


def create(tx):
    return training.create_state(jax.random.key(0), ADAPTERS, tx)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", MOMENTS)
def test_a_reader_of_gradients_behind_moments_is_refused(reader, name):
    made = reader.__name__
    told = rf"{made} comes after the transform of {name} in .*chain\({made}\("
    with pytest.raises(ValueError, match=told):
        create(optax.chain(optax.clip(1.0), MOMENTS[name](), reader(), optax.scale(-1)))
    create(optax.chain(optax.clip(1.0), reader(), MOMENTS[name](), optax.scale(-1)))


def test_wrappers_hide_nothing():
    wrong = optax.chain(optax.trace(0.9), optim.lora_pro(1e-2))
    for tx in (
        wrong,
        optax.chain(optax.identity(), wrong),
        optax.MultiSteps(wrong, 2),
        optax.apply_if_finite(wrong, 3),
        optax.inject_hyperparams(
            lambda rate: optax.chain(optax.trace(0.9), optim.lora_pro(rate))
        )(1e-2),
    ):
        with pytest.raises(ValueError, match="scale_by_lora_pro comes after"):
            create(tx)


def test_parts_side_by_side_are_no_chain():
    both = {"plain": optax.adam(1e-2), "pro": optim.lora_pro(1e-2)}
    create(optax.partition(both, {"w": "pro"}))
    create(optax.MultiSteps(optim.lora_pro(1e-2), 2))
