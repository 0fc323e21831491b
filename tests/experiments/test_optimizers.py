"""Every optimiser by name, chains as lists, and the orders that are refused."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import lorax
from experiments.trainer import optimizers
from lorax import optim
from tests import programs

AXES = lorax.Axes((0,), (1,))
LORA = {
    "f/bias": lorax.Full(jnp.ones(3)),
    "w/kernel": lorax.Lora(
        programs.normal(0, 6, 2), programs.normal(1, 2, 5), 2.0, AXES
    ),
}
ADA = {
    "w": lorax.AdaLora(
        programs.normal(0, 6, 2),
        programs.normal(2, 2),
        programs.normal(1, 2, 5),
        2.0,
        AXES,
    )
}


def config_of(**fields):
    given = dict(name="adamw", b1=0.9, b2=0.98, weight_decay=0.1, warmup_steps=0)
    return ml_collections.ConfigDict(
        given | dict(final_share=1.0, adam_learning_rate=1e-3) | fields
    )


def step(tx, adapters):
    """Updates for gradients equal to the parameters."""
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    tx = optax.with_extra_args_support(tx)
    return tx.update(adapters, tx.init(adapters), adapters, base=None)[0]


def make(**fields):
    return optimizers.make_optimizer(0.01, 100, config_of(**fields))


@pytest.mark.parametrize("name", [name for name in optimizers.READY])
def test_every_name_makes_an_optimiser(name):
    updates = step(make(name=name), LORA)
    leaves = jax.tree.leaves(updates)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(leaf.any() for leaf in leaves)


def test_the_factory_reaches_every_chainable_transformation():
    """Everything that lorax.optim makes is a link, a name or a wrapper."""
    reached = {link.make for link in optimizers.LINKS.values()}
    reached |= {*optimizers.READY.values(), *optimizers.WRAPPERS.values()}
    made = [
        name
        for name in optim.__all__
        if name.startswith(
            ("scale_by", "add_", "clip_", "lora_", "muon", "riem", "adalora")
        )
        and not name.startswith(("adalora_", "scale_by_lora_pro_"))
    ]
    missing = [name for name in made if getattr(optim, name) not in reached]
    assert not missing


def test_options_go_before_the_fields_of_the_config():
    got = step(
        make(name="lora_plus", options=(("ratio", 4.0), ("weight_decay", 0.0))), LORA
    )
    want = step(optim.lora_plus(0.01, ratio=4.0, b1=0.9, b2=0.98), LORA)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)


@pytest.mark.parametrize(
    ("options", "b1"),
    [((), None), ((("b1", 0.8),), 0.8), ((("mode", "factor"),), 0.9)],
    ids=["rowcol", "its own momentum", "factor"],
)
def test_lora_pro_has_the_momentum_of_the_config_where_it_has_adams(options, b1):
    """The default keeps n + m numbers, from a config too."""
    tx = make(name="lora_pro", options=options, weight_decay=0.0)
    want = optim.lora_pro(0.01, **{"b2": 0.98, **dict(options), "b1": b1})
    size = lambda tx: sum(x.size for x in jax.tree.leaves(tx.init(LORA)))
    assert size(tx) - size(want) == 1  # the count of the schedule
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        step(tx, LORA),
        step(want, LORA),
    )


def test_weight_decay_spares_norms_biases_and_magnitudes():
    zero = jax.tree.map(jnp.zeros_like, LORA)
    tx = make()
    updates, _ = tx.update(zero, tx.init(LORA), LORA)
    assert not updates["f/bias"].value.any()
    np.testing.assert_allclose(
        updates["w/kernel"].a, -1e-3 * LORA["w/kernel"].a, rtol=1e-5
    )


def test_a_chain_is_the_links_with_the_learning_rate_in_its_place():
    links = (
        ("clip", 1.0),
        ("lora_pro", {"damping": 0.2}),
        ("adam", {"b2": 0.99}),
        ("lora_plus", 8.0),
        ("spectral_decay", 0.1),
        ("clip_spectral", 3.0),
    )
    got = step(make(name="chain", chain=links), LORA)
    want = optax.chain(
        optax.clip_by_global_norm(1.0),
        optim.scale_by_lora_pro(damping=0.2),
        optax.scale_by_adam(b2=0.99),
        optim.scale_by_lora_plus(8.0),
        optim.add_decayed_spectral_norm(0.1),
        optax.scale_by_learning_rate(0.01),
        optim.clip_spectral_norm(3.0),
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        got,
        step(want, LORA),
    )


def test_paths_may_have_rates_of_their_own():
    links = [("adam", {}), ("scale_by_path", (("f/.*", 10.0), ("f/bias", 3.0)))]
    plain = step(make(name="chain", chain=links[:1]), LORA)
    scaled = step(make(name="chain", chain=links), LORA)
    np.testing.assert_allclose(
        scaled["f/bias"].value, 10 * plain["f/bias"].value, rtol=1e-6
    )
    kept = [scaled["w/kernel"], plain["w/kernel"]]
    jax.tree.map(np.testing.assert_array_equal, *kept)
    part = step(
        make(name="chain", chain=[links[0], ("scale_by_path", (("kernel", 9.0),))]),
        LORA,
    )
    jax.tree.map(np.testing.assert_array_equal, part, plain)  # only whole paths match


@pytest.mark.parametrize("name", ["adamw", "lora_plus", "lora_pro"])
def test_a_rate_of_its_own_is_that_of_another_run(name):
    rates = (("f/.*", 0.03),)
    own, slow = (step(make(name=name, **f), LORA) for f in ({"rates": rates}, {}))
    config = config_of(name=name, weight_decay=0.0)
    fast = step(optimizers.make_optimizer(0.03, 10, config), LORA)
    np.testing.assert_allclose(own["f/bias"].value, fast["f/bias"].value, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, own["w/kernel"], slow["w/kernel"])
    with pytest.raises(ValueError, match="rates.*follow optimizer.adam_learning_rate"):
        make(name="muon_factors", rates=rates)


def test_a_rate_of_its_own_comes_before_projections():
    links, rates = [("sgd", {}), ("clip_spectral", 1e-3)], (("w/.*", 1e3),)
    factors = step(make(name="chain", chain=links, rates=rates), LORA)["w/kernel"]
    moved = jax.tree.map(jnp.add, LORA["w/kernel"], factors)
    norm = lambda lora: np.linalg.norm(np.asarray(lora.scale * lora.a @ lora.b), 2)
    assert norm(moved) < 1.001e-3


def test_wrappers_go_around_the_first_innermost():
    adalora = {
        "target_budget": 1,
        "initial_warmup": 1,
        "final_steps": 10,
        "interval": 5,
    }
    tx = make(wrap=(("adalora", adalora), ("accumulate", 2)))
    assert isinstance(tx, optax.MultiSteps)
    first = step(tx, ADA)  # the first of two microbatches moves nothing
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))
    assert step(make(wrap=(("adalora", adalora),)), ADA)["w"].p.any()


@pytest.mark.parametrize(
    "fields,told",
    [
        ({"name": "adamax"}, "optimizer.name='adamax' is not one of adamw, sgd"),
        ({"name": "chain"}, "optimizer.chain is empty"),
        ({"name": "chain", "chain": (("adan", None),)}, "'adan' is not one of clip"),
        (
            {"name": "chain", "chain": (("adam", None), ("lora_pro", None))},
            "adam, lora_pro is not in the order .*write lora_pro, adam",
        ),
        (
            {"name": "chain", "chain": (("spectral_decay", 0.1), ("lora_plus", 2.0))},
            "write lora_plus, spectral_decay",
        ),
        ({"wrap": (("ema", 0.9),)}, "optimizer.wrap: 'ema' is not one of adalora"),
        (
            {"wrap": (("accumulate", 2), ("adalora", {}))},
            "'adalora' around 'accumulate' would count microbatches",
        ),
    ],
)
def test_bad_input(fields, told):
    with pytest.raises(ValueError, match=told):
        make(**fields)
