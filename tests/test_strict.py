"""JAX's strict settings: lorax's computations pass under each, on a bfloat16 base.

Under "strict" promotion and "raise" of ranks every line is traced: adapters, inits,
optimisers and the train step. (optax's own Adam raises an int32 count to a float power,
so lorax's chains run that one link under standard promotion.)
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import inits, optim, training
from tests import programs
from tests.optim.rows import ROWS


@contextlib.contextmanager
def strict():
    """Promotes neither dtypes nor ranks: both raise while tracing."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


MODES = {
    "strict": strict,
    "x64": lambda: jax.enable_x64(True),
    "nans": lambda: jax.debug_nans(True),
    "checks": lambda: jax.enable_checks(True),
    "rbg": lambda: jax.default_prng_impl("rbg"),
}
SHAPES = {
    "dense": (6, 5),
    "stack": (8, 5, 5),
    "heads": (5, 2, 3),
    "conv": (3, 6, 4),
    "table": (7, 6),
    "bias": (5,),
}
TARGET = functools.partial(lorax.Target, rank=2, alpha=3)
OTHERS = [
    TARGET("table", init="gaussian", options={"zero": "b"}),  # LoRA-FA freezes a
    TARGET("bias", adapter="full"),
]


def loss_fn(params, batch):
    """Every use of a kernel, with ranks and dtypes written out."""
    x = params["table"][batch["ids"]]
    y = jax.lax.conv_general_dilated(
        x, params["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    x = x @ params["dense"] + params["bias"][None, None]
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]
    z = jnp.einsum("bti,ihd->bthd", x, params["heads"])
    square = lambda v: jnp.mean(v.astype(jnp.float32) ** 2)
    return square(y) + square(z) + square(x @ params["dense"].T)


def base():
    shapes = {name: jax.ShapeDtypeStruct(s, jnp.bfloat16) for name, s in SHAPES.items()}
    params = programs.filled(shapes)
    return params, {"ids": jnp.array([[0, 1, 2, 3], [4, 5, 6, 0]])}


def train(mode, target, tx, whole=True, **options):
    """Discovers, calibrates, initialises, takes two steps and merges, in one mode."""
    others = [TARGET("stack|heads|conv", adapter=like(target)), *OTHERS]
    targets = [target, *others] if whole else [target, OTHERS[-1]]
    with MODES[mode]():
        params, batch = base()
        key = jax.random.key(0)
        kernels = lorax.discover(loss_fn, params, batch)
        stats = None
        if inits.of_target(target).stats:
            stats = lorax.calibrate(key, loss_fn, params, targets, [batch], kernels)
        adapters, params = lorax.init(key, params, targets, kernels, stats)
        tx = tx(adapters)
        state = training.create_state(key, adapters, tx)
        step = training.make_train_step(
            training.simple_loss(loss_fn), tx, clip_norm=1.0, **options
        )
        if mode == "strict":  # raises while tracing
            after, metrics = jax.eval_shape(step, state, params, batch)
            merged = jax.eval_shape(lorax.merge, after.adapters, params)
        else:
            step = jax.jit(step)
            for _ in range(2):
                state, metrics = step(state, params, batch)
            after, merged = state, lorax.merge(state.adapters, params)
            assert int(metrics["skipped"]) == 0
            assert all(np.isfinite(v).all() for v in jax.tree.leaves(merged))
    kinds = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
    assert kinds(after.adapters) == kinds(adapters)
    assert {v.dtype for v in jax.tree.leaves(after.adapters)} == {jnp.float32.dtype}
    assert kinds(merged) == kinds(params)


def like(target):
    return "dora" if target.adapter == "dora" else "lora"


INITS = {
    "standard": {},
    "dora": {"adapter": "dora"},
    "dora_whole": {"adapter": "dora", "options": {"detach_norm": False}},
    "adalora": {"adapter": "adalora"},
    "full": {"adapter": "full"},
    "dropout": {"dropout": 0.5},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "pissa_fast": {"init": "pissa", "options": {"iterations": 2}},
    "olora": {"init": "olora"},
    "lora_ga": {"init": "lora_ga"},
    "lora_one": {"init": "lora_one"},
    "eva": {"init": "eva"},
    "corda": {"init": "corda"},
}
SGD = lambda adapters: optax.sgd(0.1)


@pytest.mark.parametrize("name", INITS)
def test_adapters_and_inits(name):
    train("strict", TARGET("dense", **INITS[name]), SGD, accumulate=2)


def spectral(target):
    """The row's chain without optax's Adam."""
    return optax.chain(
        optim.add_decayed_spectral_norm(0.01, target=target),
        optax.scale_by_learning_rate(0.1),
        optim.clip_spectral_norm(50.0),
    )


def optimiser(row):
    """The row's optimiser, with only lorax's parts under strict settings."""
    kwargs = dict(row.kwargs)
    if row.name.startswith("spectral"):
        return spectral(kwargs["target"])
    if row.needs_svd:  # two triplets in this tree
        kwargs |= {"target_budget": 1}
        kwargs.pop("learning_rate")
        return optim.adalora(optax.sgd(0.1), **kwargs)
    return row.make(**kwargs)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_optimisers(row):
    target = TARGET("dense", adapter="adalora" if row.needs_svd else "lora")
    options = {"accumulate": 2} if "microbatch" in row.extra else {}
    train("strict", target, lambda _: optimiser(row), whole=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "strict"])
@pytest.mark.parametrize("name", ["dora", "pissa", "lora_ga"])
def test_a_run(name, mode):
    train(mode, TARGET("dense", **INITS[name]), lambda _: optim.lora_pro(0.1))
