"""VeRA: its sum and gradients in numpy, what kernels share, and its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.adapters import reference

TARGET = lorax.Target("w", rank=3, adapter="vera")


def test_update_and_gradients_by_hand():
    """dW_ij = sum_k A_ik d_k B_kj b_j, so dL/db_j = sum_i G_ij (A diag(d) B)_ij."""
    case = reference.case(TARGET)
    d, b, reads, writes = (case.fields[n] for n in ("d", "b", "reads", "writes"))
    update = np.einsum("ik,k,kj,j->ij", reads, d, writes, b)
    reference.assert_close(case.delta, update, 1e-5)
    expected = {
        "d": np.einsum("ij,ik,kj,j->k", case.cotangent, reads, writes, b),
        "b": np.einsum("ij,ik,k,kj->j", case.cotangent, reads, d, writes),
    }
    reference.assert_gradients(case, expected)


def test_kernels_share_the_leading_parts_of_one_pair():
    params = {"one": jnp.ones((6, 4)), "two": jnp.ones((3, 9))}
    target = lorax.Target("one|two", rank=5, adapter="vera")
    adapters, base = lorax.init(jax.random.key(0), params, target)
    shapes = {name: array.shape for name, array in base.frozen.items()}
    assert shapes == {"vera/5/reads": (6, 5), "vera/5/writes": (5, 9)}
    assert [len(jax.tree.leaves(a)) for a in adapters.values()] == [2, 2]
    adapters = jax.tree.map(jnp.ones_like, adapters)
    merged, (a, b) = lorax.merge(adapters, base), base.frozen.values()
    for name, (n, m) in {"one": (6, 4), "two": (3, 9)}.items():
        expected = 1 + reference.wide(a)[:n] @ reference.wide(b)[:, :m]
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5)


def test_each_rank_has_a_pair_and_the_start():
    params = {"one": jnp.ones((400, 300)), "two": jnp.ones((300, 400))}
    rule = lambda name, rank: lorax.Target(name, rank=rank, adapter="vera")
    rules = [rule("one", 64), rule("two", 500)]
    adapters, base = lorax.init(jax.random.key(0), params, rules)
    assert len(base.frozen) == 4
    one = adapters["one"]
    assert one.scale == 1 and not one.b.any() and (one.d == np.float32(0.1)).all()
    for name, fan in (("reads", 400), ("writes", 64)):
        array = reference.wide(base.frozen[f"vera/64/{name}"])
        assert np.abs(array).max() <= np.sqrt(6 / fan)
        np.testing.assert_allclose(array.std(), np.sqrt(2 / fan), rtol=0.02)


@pytest.mark.parametrize("given", [0.0, float("nan"), "0.1", True])
def test_a_start_that_cannot_train_is_refused(given):
    target = lorax.Target("w", adapter="vera", options={"d_initial": given})
    with pytest.raises(ValueError, match="d_initial=.*; give a number other than 0"):
        lorax.init(jax.random.key(0), {"w": jnp.ones((9, 9))}, target)


def test_without_the_projections_it_says_what_to_pass():
    adapters, _ = lorax.init(jax.random.key(0), {"w": jnp.ones((9, 9))}, TARGET)
    with pytest.raises(ValueError, match="VeRA needs the frozen array 'vera/3/reads'"):
        lorax.merge(adapters, {"w": jnp.ones((9, 9))})
