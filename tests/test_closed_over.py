"""Concrete arrays closed over by a jitted function: everything works there too.

Inside `jax.jit` an operation on a known array gives a tracer, so code that reads values
must evaluate them eagerly. Each row gives the same result inside jit as outside.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.checkpoint import digests
from lorax.interop import residual
from lorax.scaling import batch
from tests import adapter_sets as make
from tests.programs import normal

PARAMS = {"v": normal(1, 8, 6), "w": normal(2, 8, 6)}
X = normal(3, 4, 8)
KEY = jax.random.key(0)


def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["v"] + x @ params["w"]) ** 2)


def of(maker, seed):
    return {"w": maker(seed, 2, 0.5, in_=(8,), out=(6,))}


def init(key, **target):
    return lorax.init(key, PARAMS, lorax.Target("[vw]", rank=2, **target))


def calibrated(key, init="lora_ga"):
    targets = [lorax.Target("[vw]", rank=2, init=init)]
    stats = lorax.calibrate(key, loss, PARAMS, targets, [X], passes=2, width=2)
    return lorax.init(key, PARAMS, targets, stats=stats)


LORA = of(make.lora, 1)
STACK = lorax.compose.stack([LORA, LORA])
PISSA = lorax.init(KEY, PARAMS, lorax.Target("w", rank=2, init="pissa"))
ROWS = {
    "init": lambda key: init(key),
    "dora": lambda key: init(key, adapter="dora"),
    "adalora": lambda key: init(key, adapter="adalora"),
    "pissa": lambda key: init(key, init="pissa"),
    "olora": lambda key: init(key, init="olora"),
    "full": lambda key: init(key, adapter="full"),
    "calibrate": calibrated,
    "eva": lambda key: calibrated(key, "eva"),
    "corda": lambda key: calibrated(key, "corda"),
    "merge": lambda key: lorax.merge(LORA, PARAMS),
    "merge_report": lambda key: lorax.merge_report(LORA, PARAMS),
    "combine": lambda key: lorax.compose.combine([LORA, LORA], [0.5, 2.0]),
    "ties": lambda key: lorax.compose.combine(
        [LORA, LORA], [0.5, 2.0], "ties", density=0.5
    ),
    "stack": lambda key: lorax.compose.stack([LORA, LORA]),
    "unstack": lambda key: lorax.compose.unstack(STACK),
    "resize": lambda key: lorax.compose.resize(LORA, 1),
    "extract": lambda key: lorax.compose.extract(
        PARAMS, lorax.merge(LORA, PARAMS), lorax.Target("w", rank=2)
    ),
    "amplification": lambda key: lorax.analysis.amplification(key, LORA, PARAMS),
    "intruders": lambda key: lorax.analysis.intruder_dimensions(key, LORA, PARAMS, k=2),
    "batch": lambda key: batch.learning_rate_for_batch(1e-3, 8, 64),
    "digest": lambda key: digests.describe(PARAMS),
    "residual": lambda key: residual.initial(PISSA[0], PARAMS, PISSA[1]),
}


@pytest.mark.parametrize("name", ROWS)
def test_inside_of_jit_as_outside(name):
    kept = []

    def run(key):
        arrays, treedef = jax.tree.flatten(ROWS[name](key))
        known = [x for x in arrays if not isinstance(x, jax.Array)]
        kept[:] = [treedef, known]
        return [x for x in arrays if isinstance(x, jax.Array)]

    want, fixed = run(KEY), list(kept)
    got = jax.jit(run)(KEY)
    assert kept == fixed  # the structure, numbers and strings
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_values_that_are_not_finite_are_named_inside_of_jit():
    bad = {"w": PARAMS["w"].at[0, 0].set(jnp.nan)}
    make_ = jax.jit(lambda key: lorax.init(key, bad, lorax.Target("w", rank=2))[0])
    with pytest.raises(ValueError, match="w: the leaf holds NaN"):
        make_(KEY)
