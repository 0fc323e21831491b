"""Adapters whose init moved part of the base say so, and mix with no others."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import checkpoint, compose, population, training
from lorax.checkpoint import states
from lorax.types import GradSketch
from tests import adapter_sets as make
from tests import programs

PARAMS = {"w": programs.normal(0, 6, 5)}
KEYS = jax.random.split(jax.random.key(0))
TX = optax.adamw(1e-2, mask=lorax.optim.decay_mask)


def start(init="pissa", rank=2, seed=0, **fields):
    """Initial adapters of one leaf, and what the init left of the base."""
    u, s, vt = np.linalg.svd(programs.normal(9, 6, 5), full_matrices=False)
    stats = {"w": GradSketch(*(jnp.asarray(part) for part in (u, s, vt)))}
    target = lorax.Target("w", rank=rank, alpha=4, init=init, **fields)
    return lorax.init(jax.random.key(seed), PARAMS, target, stats=stats)


def trained(adapters, seed=1):
    """The same adapters after some random updates."""
    return jax.tree.map(lambda v: v + 0.1 * programs.normal(seed, *v.shape), adapters)


STANDARD, OTHER = start("standard")[0], start("standard", seed=1)[0]
PISSA, REST = start()


@pytest.mark.parametrize(
    "init,fields,record",
    [
        ("standard", {}, None),
        ("standard", {"adapter": "dora"}, None),
        ("standard", {"adapter": "adalora"}, None),
        ("gaussian", {}, None),
        ("lora_one", {}, None),
        ("pissa", {}, "pissa(rank=2)"),
        ("pissa", {"adapter": "dora"}, "pissa(rank=2)"),
        ("pissa", {"adapter": "adalora"}, "pissa(rank=2)"),
        ("pissa", {"options": {"iterations": 4}}, "pissa(rank=2, iterations=4)"),
        ("olora", {}, "olora(rank=2, scale=2.0)"),
        ("milora", {}, "milora(rank=2)"),
        ("milora", {"adapter": "adalora"}, "milora(rank=2)"),
        ("orthogonal", {}, None),
        (
            "lora_ga",
            {"options": {"scale": "gd"}},
            "lora_ga(rank=2, scale=2.0, options={'scale': 'gd', 'gamma': 16.0, "
            "'norm_clip': False})",
        ),
    ],
)
def test_the_record_of_every_init(init, fields, record):
    adapters, params = start(init, **fields)
    assert adapters["w"].moved_by == record
    assert (params["w"] is PARAMS["w"]) == (record is None)


def test_every_way_an_adapter_takes_keeps_the_record(tmp_path):
    compiled = jax.jit(lambda adapters: jax.tree.map(lambda v: 2 * v, adapters))
    updates, _ = TX.update(PISSA, TX.init(PISSA), PISSA)
    checkpoint.save_adapters(tmp_path, PISSA, REST)
    stacked = compose.stack([PISSA, trained(PISSA)])
    both = jax.random.split(jax.random.key(0))
    members = population.create_population(both, [PISSA, trained(PISSA)], TX, REST)
    for adapters in (
        compiled(PISSA),
        jax.eval_shape(compiled, PISSA),
        optax.apply_updates(PISSA, updates),
        checkpoint.load_adapters(tmp_path),
        checkpoint.load_adapters(tmp_path, PISSA, REST),
        stacked,
        compose.unstack(stacked)[1],
        compose.switch(trained(PISSA), PISSA),
        compose.resize(PISSA, 1).adapters,
        compose.resize(PISSA, 4).adapters,
        population.member(members, 1),
        {"w": lorax.adapters.as_lora(start(adapter="adalora")[0]["w"])},
    ):
        assert adapters["w"].moved_by == "pissa(rank=2)"
    tuned = lorax.merge(trained(PISSA), REST)
    target = lorax.Target("w", rank=5, init="pissa")  # the init does not matter here
    assert compose.extract(PARAMS, tuned, target).adapters["w"].moved_by is None


def test_a_template_of_another_base_is_refused(tmp_path):
    checkpoint.save_adapters(tmp_path, STANDARD)
    with pytest.raises(ValueError, match=r"w: .*moved_by=None and the .*pissa.rank=2"):
        checkpoint.load_adapters(tmp_path, PISSA)


def test_files_from_before_the_record_take_the_templates(tmp_path):
    checkpoint.save_adapters(tmp_path, PISSA, REST)
    index = json.loads((tmp_path / "adapters.json").read_text())
    assert index["adapters"]["w"]["static"].pop("moved_by") == "pissa(rank=2)"
    del index["digests"]
    (tmp_path / "adapters.json").write_text(json.dumps(index))
    assert checkpoint.load_adapters(tmp_path)["w"].moved_by is None
    like = checkpoint.load_adapters(tmp_path, PISSA, REST)
    assert like["w"].moved_by == "pissa(rank=2)"
    state = training.create_state(KEYS[0], PISSA, TX)
    told = states.describe(state)
    del told["adapters"]["w"]["static"]["moved_by"]
    states.check(told, state)
    plain = training.create_state(KEYS[0], STANDARD, TX)
    with pytest.raises(ValueError, match="moved_by=pissa.* template moved_by=None"):
        states.check(states.describe(state), plain)


HALF = [0.5, 0.5]
LEFT = r"the base as pissa\(rank=2\) left it"


@pytest.mark.parametrize(
    "call,message",
    [
        (
            lambda: compose.stack([PISSA, STANDARD]),
            f"set 0 belongs to {LEFT}, set 1 to",
        ),
        (lambda: compose.stack([STANDARD, PISSA]), f"set 0 belongs .*set 1 to {LEFT}"),
        (
            lambda: compose.stack([PISSA, start(rank=1)[0]]),
            r"1 to the base as pissa.rank=1",
        ),
        (
            lambda: compose.stack([PISSA, start("olora")[0]]),
            r"1 to the base as olora.rank=2",
        ),
        (
            lambda: compose.stack([PISSA, {"v": STANDARD["w"]}], missing="zero"),
            rf"sets \[1\] lack it, and the others belong to {LEFT}",
        ),
        (lambda: compose.switch(STANDARD, PISSA), f"adapter belongs .*like to {LEFT}"),
        (lambda: compose.switch(PISSA, STANDARD), f"belongs to {LEFT}, like to the"),
        (lambda: compose.combine([PISSA, STANDARD], HALF), f"{LEFT}: .* combine would"),
        (lambda: compose.combine([OTHER, PISSA], HALF, "svd"), f"{LEFT}: .* combine w"),
        (
            lambda: compose.combine([STANDARD, PISSA], HALF, "ties", density=0.5),
            f"{LEFT}: .* combine would",
        ),
        (lambda: compose.scale(PISSA, 0.5), f"{LEFT}: .* scale would change"),
        (lambda: compose.negate(PISSA), f"{LEFT}: .* scale would change"),
        (lambda: compose.to_lora(PISSA), f"{LEFT}: .*to_lora without initial="),
        (
            lambda: compose.to_lora(PISSA, STANDARD),
            f"belongs to {LEFT}, initial to the",
        ),
        (
            lambda: population.create_population(KEYS, [PISSA, STANDARD], TX, PARAMS),
            r"member 1 has moved_by=None, but member 0 has 'pissa\(rank=2\)'",
        ),
        (
            lambda: population.create_population(
                KEYS, [PISSA, start(rank=1)[0]], TX, PARAMS
            ),
            r"member 1 has moved_by='pissa\(rank=1\)'",
        ),
    ],
)
def test_sets_of_different_bases_do_not_mix(call, message):
    with pytest.raises(ValueError, match=f"w: .*{message}"):
        call()


def test_on_the_base_as_given_they_combine_to_the_right_kernel():
    """W + sum_k w_k (merged_k - W), in numpy, from sets of three bases."""
    olora, rest = start("olora")
    sets = [trained(PISSA), trained(olora, 2), trained(STANDARD, 3)]
    bases, weights = [REST, rest, PARAMS], [0.5, 1.0, -2.0]
    w = np.asarray(PARAMS["w"], np.float64)
    wide = lambda v: np.asarray(v, np.float64)
    moves = [wide(b["w"]) + make.delta(s["w"]) - w for s, b in zip(sets, bases)]
    want = w + sum(c * move for c, move in zip(weights, moves))
    plain = [
        compose.to_lora(own, initial)
        for own, initial in zip(sets[:2], (PISSA, olora), strict=True)
    ]
    assert all(own["w"].moved_by is None for own in plain)
    combined = compose.combine([*plain, sets[2]], weights).adapters
    make.close(lorax.merge(combined, PARAMS)["w"], want)
    make.close(lorax.merge(compose.scale(plain[0], 3.0), PARAMS)["w"], w + 3 * moves[0])


def test_sets_of_one_moved_base_are_stacked_and_routed_on_it():
    sets = [trained(PISSA), trained(PISSA, 2)]
    routed = compose.route(lambda params, x: x @ params["w"])
    x, index = programs.normal(5, 3, 6), jnp.array([1, 0, 1])
    got = routed(compose.stack(sets), index, REST, x)
    kernels = [np.asarray(REST["w"], np.float64) + make.delta(s["w"]) for s in sets]
    want = [np.asarray(x[i], np.float64) @ kernels[k] for i, k in enumerate(index)]
    make.close(got, np.stack(want))
