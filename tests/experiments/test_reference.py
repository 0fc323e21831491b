"""The reference model of a loss: the initial model for any init, on one base."""

import functools
import math

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from experiments.generation import unmerged
from experiments.tasks import prefer
from experiments.trainer import prepare
from lorax import training
from lorax.losses import preferences as of

ROWS, TIME, WORDS = 4, 6, 16


class Model(nn.Module):
    """Predicts each token from the one before."""

    width: int = 8

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(WORDS, self.width, name="embed")(tokens)
        x = nn.Dense(2 * self.width, name="up")(x)
        return nn.Dense(WORDS, name="down", use_bias=False)(nn.tanh(x))


def batch(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, WORDS, (ROWS, 2, TIME + 1), np.int32)
    weights = np.arange(TIME) < rng.integers(2, TIME + 1, (ROWS, 2, 1))
    return {
        "inputs": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "weights": weights.astype(np.float32),
    }


BATCHES = grain.MapDataset.source([batch(seed) for seed in range(8)]).repeat()
SCORE = prefer.make_score(Model(), 0, pairs=True)
JUDGE = functools.partial(prefer.METHODS["dpo"].judge, of.dpo)


def loss_fn(params, batch, said):
    tally = JUDGE(SCORE(params, batch), said, batch)
    means = {name: total / count for name, (total, count) in tally.items()}
    return means.pop("loss"), {**means, "weight": tally["loss"][1]}


def reference(frozen, params, batch):
    return unmerged.either(SCORE)(unmerged.Unmerged(frozen, params), batch)


TOKENS = jnp.zeros((1, TIME), jnp.int32)
PARAMS = Model().init(jax.random.key(0), TOKENS)["params"]


def problem(*targets, **fields):
    fields = {"reference": reference, **fields}
    tx = optax.adam(1e-2)
    return prepare.Problem(loss_fn, PARAMS, targets, tx, BATCHES, **fields)


LOW_RANK = ".*(up|down)/kernel"
STARTS = [
    {"dropout": 0.5},
    {"init": "pissa", "adapter": "dora"},
    {"init": "lora_one"},
    {"adapter": "full"},
]
MORE = [
    {},
    {"adapter": "dora"},
    {"init": "pissa"},
    {"init": "olora"},
    {"init": "lora_ga"},
    {"init": "eva"},
    {"adapter": "vera"},
]


@pytest.mark.parametrize(
    "start",
    [*STARTS, *(pytest.param(start, marks=pytest.mark.slow) for start in MORE)],
    ids=str,
)
def test_at_the_start_every_loss_is_log_2_and_then_falls(start):
    rank = {} if start.get("adapter") == "full" else {"rank": 2}
    own = problem(lorax.Target(LOW_RANK, **rank, **start))
    prepared = prepare.prepare(jax.random.key(1), own)
    state, found = prepared.state, []
    for number in range(12):
        state, told = prepared.step(state, prepared.params, batch(number % 2))
        found.append(jax.device_get(told))
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert found[0]["rewards/rejected"] == pytest.approx(0, abs=1e-6)
    margin = found[-1]["rewards/chosen"] - found[-1]["rewards/rejected"]
    assert found[-1]["loss"] < math.log(2) - 1e-3 and margin > 1e-3
    # evaluation uses the initial model, which differs from the base only for LoRA-One
    model = prepared.merge(state.adapters, prepared.params)
    said = reference(model.start, model.params, batch(0)).total
    base = SCORE(own.params, batch(0)).total
    assert np.allclose(said, base, rtol=1e-4) == (start.get("init") != "lora_one")


def size(step, *args):
    return jax.jit(step).lower(*args).compile().memory_analysis()


def test_a_step_holds_one_base():
    """Arguments are those of supervised training, and the base is not copied."""
    model, tx = Model(512), optax.adam(1e-2)
    score = prefer.make_score(model, 0, pairs=True)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    kernels = lorax.discover(score, params, batch(0))
    targets = [lorax.Target(LOW_RANK, rank=2)]
    adapters, params = lorax.init(jax.random.key(0), params, targets, kernels)
    state = training.create_state(jax.random.key(1), adapters, tx)

    def supervised(params, batch):
        return -score(params, batch).total.mean()

    def preferred(params, batch, said):
        return JUDGE(score(params, batch), said, batch)["loss"][0]

    def reference(frozen, params, batch):
        return lorax.adapt(score)(frozen, params, batch)

    plain = training.make_train_step(training.simple_loss(supervised), tx)
    compared = training.make_train_step(
        training.simple_loss(preferred), tx, reference=reference
    )
    args = state, params, batch(0)
    one, two = size(plain, *args), size(compared, *args, None, {})
    base = sum(x.nbytes for x in jax.tree.leaves(params))
    assert two.argument_size_in_bytes == one.argument_size_in_bytes
    assert base < one.argument_size_in_bytes < 1.5 * base
    assert two.temp_size_in_bytes < one.temp_size_in_bytes + 0.2 * base


def test_microbatches_have_a_reference_each_and_give_the_whole_step():
    own = problem(lorax.Target(LOW_RANK, rank=2))
    kernels = lorax.discover(SCORE, own.params, batch(0))
    adapters, params = lorax.init(jax.random.key(0), own.params, own.targets, kernels)
    state = training.create_state(jax.random.key(1), adapters, optax.sgd(1.0))
    found = []
    for accumulate in (1, 2):
        step = training.make_train_step(
            training.simple_loss(loss_fn),
            optax.sgd(1.0),
            accumulate=accumulate,
            reference=reference,
        )
        after, told = jax.jit(step)(state, params, batch(0), frozen={})
        after, told = jax.jit(step)(after, params, batch(0), frozen={})
        found.append((after.adapters, told["loss"]))
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, *found)
    assert found[0][1] < math.log(2)


def test_a_teacher_is_an_argument_of_the_step():
    teacher = {"up": {"kernel": jnp.ones((8, 16))}}

    def distance(params, batch, said):
        return jnp.mean(jnp.square(params["up"]["kernel"] - said))

    def read(frozen, params, batch):
        return frozen["up"]["kernel"]

    target = lorax.Target(".*up/kernel", adapter="full")
    own = problem(target, reference=read, frozen=teacher)._replace(loss_fn=distance)
    prepared = prepare.prepare(jax.random.key(0), own)
    state, told = prepared.step(prepared.state, prepared.params, batch(0))
    want = np.square(np.asarray(own.params["up"]["kernel"]) - 1).mean()
    np.testing.assert_allclose(told["loss"], want, rtol=1e-6)


def test_an_evaluation_step_has_the_reference_too():
    own = problem(lorax.Target(LOW_RANK, rank=2))
    prepared = prepare.prepare(jax.random.key(1), own)
    step = training.make_eval_step(training.simple_loss(loss_fn), reference=reference)
    told = step(prepared.state, prepared.params, batch(0), frozen={})
    np.testing.assert_allclose(told["loss"], math.log(2), rtol=1e-6)
