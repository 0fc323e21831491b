"""Pairs of equal shapes together: the same numbers, small programs, no gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.planning import traffic
from lorax import optim
from lorax.adapters import Lora
from lorax.optim import _pairwise
from lorax.types import Axes
from tests.optim import problems

FAST = {"xla_backend_optimization_level": 0}


def test_every_path_gets_its_own_whatever_shares_its_group():
    """Groups by hand: two stacks of one shape, one of another scale, shape or dtype."""
    stacked = problems.lora("stacked", seed=1)  # 3 x [4, 2], [2, 5]
    single = Lora(problems.draw(3, 4, 2), problems.draw(4, 2, 5), 1.5, problems.DENSE)
    adapters = {
        "stacked": stacked,
        "bias": problems.full(),
        "single": single,
        "scaled": single.replace(scale=2.0),
        "wide": problems.lora(seed=5),
        "half": jax.tree.map(lambda x: x.astype(jnp.bfloat16), single),
    }
    depths = []

    def function(update, given):
        depths.append(len(update.a))
        return update.a * given.scale + given.a, given.rank * update.b

    updates = problems.like(adapters)
    got = _pairwise.map_pairs(function, updates, adapters)
    assert list(got) == list(updates) and sorted(depths) == [1, 1, 5]
    assert got["bias"] is updates["bias"]
    for path in ("stacked", "single", "scaled", "wide", "half"):
        u, w = updates[path], adapters[path]
        want = np.asarray(u.a, np.float64) * w.scale + np.asarray(w.a, np.float64)
        rough = 1e-2 if path == "half" else 1e-6
        np.testing.assert_allclose(np.asarray(got[path].a, float), want, rough, rough)
        np.testing.assert_array_equal(got[path].b, 2 * u.b)
        assert got[path].b.dtype == u.b.dtype


def test_a_large_pair_stays_by_itself():
    large = Lora(jnp.ones((2**14, 2)), jnp.ones((2, 2**14 + 1)), 1.0, problems.DENSE)
    depths = []

    def function(update, given):
        depths.append(len(update.a))
        return update.a, given.b

    _pairwise.map_pairs(function, {"u": large, "v": large}, {"u": large, "v": large})
    assert depths == [1, 1]
    with pytest.raises(ValueError, match="reads the adapters: call tx.update"):
        _pairwise.map_pairs(function, {"u": large}, None)


def small_pairs(count):
    return {f"layer_{i}": problems.lora(seed=i) for i in range(count)}


def compiled(tx, adapters):
    update = jax.jit(lambda g, s, a: tx.update(g, s, a))
    return update.lower(adapters, tx.init(adapters), adapters).compile(FAST).as_text()


@pytest.mark.parametrize("mode", ["factor", "rowcol"])
def test_the_program_of_many_small_pairs_stays_beside_adams(mode):
    """Program lines relative to AdamW's; one pair at a time it would be 5.8 and 9.2."""
    lines = lambda tx: len(compiled(tx, small_pairs(12)).splitlines())
    assert lines(optim.lora_pro(1e-3, mode)) <= 3 * lines(optax.adamw(1e-3))


WHERE = {  # specs of a and b of kernels [in, out]: two alike, and two others
    "in": (P("x"), P()),
    "in_too": (P("x"), P()),
    "out": (P(), P(None, "x")),
    "whole": (P(), P()),
}


@functools.cache
def placed(kind):
    """Pairs of one shape on a mesh, and their updates."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    lora = Lora(problems.draw(0, 16, 2), problems.draw(1, 2, 16), 1.5, Axes((0,), (1,)))

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    return mesh, {
        path: lora.replace(a=put(lora.a, a), b=put(lora.b, b))
        for path, (a, b) in WHERE.items()
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("make", [optim.riemannian, optim.lora_pro])
def test_pairs_that_lie_differently_are_not_gathered(make, kind):
    """Together they exchange what they would alone, and gather nothing."""
    mesh, adapters = placed(kind)

    def exchanged(adapters):
        with jax.set_mesh(mesh):
            return traffic.read(compiled(make(1e-3), adapters)).bytes_by_kind()

    alone = [exchanged({path: lora}) for path, lora in adapters.items()]
    total = {}
    for one in alone:
        for name, nbytes in one.items():
            total[name] = total.get(name, 0) + nbytes
    together = exchanged(adapters)
    assert together == total and total["all-reduce"] > 0
    assert not {"all-gather", "all-to-all", "collective-permute"} & set(together)
