"""Kernels in 8-bit floats are refused by whatever would write into them.

Adapters beside them need `discover` to see the program: `quantized/own_code.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import compose
from tests import adapter_sets as make
from tests.programs import normal

FLOATS = [jnp.float8_e4m3fn, jnp.float8_e5m2]
SAYS = "w: the (leaf|base) is quantised .float8.*dequantise"


def scaled_after(params, x):
    """A product in 8 bits, with its scale after it."""
    y = x @ params["w"].astype(x.dtype)
    return jnp.sum((y * params["scale"]) ** 2)


def quantised(dtype):
    return {"w": normal(1, 6, 5).astype(dtype), "scale": jnp.full(5, 1 / 565)}


VERBS = {
    "init": lambda p, x: lorax.init(jax.random.key(0), p, [("w", 2)]),
    "full": lambda p, x: lorax.init(
        jax.random.key(0), p, lorax.Target("w", adapter="full")
    ),
    "calibrate": lambda p, x: lorax.calibrate(
        jax.random.key(0), scaled_after, p, lorax.Target("w", 2, init="lora_ga"), [x]
    ),
    "merge": lambda p, x: lorax.merge({"w": make.lora(1)}, p),
    "merge dora": lambda p, x: lorax.merge({"w": make.dora(1)}, p),
    "merge full": lambda p, x: lorax.merge({"w": lorax.Full(normal(2, 6, 5))}, p),
    "merge_report": lambda p, x: lorax.merge_report({"w": make.lora(1)}, p),
    "extract": lambda p, x: compose.extract(p, p, [("w", 2)]),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", VERBS)
def test_every_verb_refuses(name, dtype):
    with pytest.raises(ValueError, match=SAYS):
        VERBS[name](quantised(dtype), normal(0, 3, 6))


def test_dequantised_it_is_adapted():
    params = quantised(FLOATS[0])
    wide = params["w"].astype(jnp.float32) * params["scale"]
    fn = lambda params, x: x @ params["w"]
    x, adapter = normal(0, 3, 6), make.lora(1)
    got = lorax.adapt(fn)({"w": adapter}, {"w": wide}, x)
    by_hand = np.asarray(x, np.float64) @ (np.asarray(wide) + make.delta(adapter))
    np.testing.assert_allclose(got, by_hand, rtol=1e-5, atol=1e-5)
