"""RandLoRA: the sum over bases in numpy, wide and tall kernels, and its start."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.adapters import reference

TARGET = lorax.Target("w", rank=2, alpha=3, adapter="randlora")


def bases(fields, n, m):
    """B_j in the order in which PEFT's flattening pairs them with A's rows."""
    rank, count = fields["lam"].shape
    columns = fields["large"][: max(n, m), :count].reshape(max(n, m), -1)
    return [columns[:, [i * count + j for i in range(rank)]] for j in range(count)]


@pytest.mark.parametrize("n, m", [(5, 8), (8, 5), (6, 6)])
def test_update_and_gradients_by_hand(n, m):
    """sum_j B_j diag(lam_j) A diag(gamma_j); transposed for a wide kernel."""
    with pytest.warns(lorax.MergeWarning, match="RandLora has no form"):
        case = reference.case(TARGET, (n, m), on_merge="warn")
    lam, gamma = case.fields["lam"], case.fields["gamma"]
    small = case.fields["small"][:, : min(n, m)]
    assert lam.shape == (2, math.ceil(min(n, m) / 2))
    g = case.cotangent if n > m else case.cotangent.T  # [large, small]
    total, expected = 0, {"lam": np.zeros_like(lam), "gamma": np.zeros_like(gamma)}
    for j, base in enumerate(bases(case.fields, n, m)):
        total = total + base @ np.diag(lam[:, j]) @ small @ np.diag(gamma[j])
        expected["lam"][:, j] = 1.5 * np.diag(base.T @ g @ np.diag(gamma[j]) @ small.T)
        expected["gamma"][j] = 1.5 * np.diag(g.T @ base @ np.diag(lam[:, j]) @ small)
    reference.assert_close(case.delta, 1.5 * (total if n > m else total.T), 1e-5)
    reference.assert_gradients(case, expected)
    assert np.linalg.matrix_rank(case.delta, tol=1e-4) == min(n, m)


def test_the_start_and_what_is_shared():
    params = {"one": jnp.ones((60, 90)), "two": jnp.ones((80, 40))}
    target = lorax.Target("one|two", rank=7, adapter="randlora")
    adapters, base = lorax.init(jax.random.key(0), params, target)
    shapes = {name: array.shape for name, array in base.frozen.items()}
    assert shapes == {"randlora/7/small": (7, 80), "randlora/7/large": (90, 12, 7)}
    one, two = adapters["one"], adapters["two"]
    assert one.lam.shape == (7, 9) and two.gamma.shape == (6, 40)
    assert not one.lam.any() and (one.gamma == np.float32(1 / 60)).all()
    for array in base.frozen.values():
        assert np.abs(array).max() <= math.sqrt(3)
        np.testing.assert_allclose(np.std(array), 1, rtol=0.05)


def test_there_is_no_branch_whose_input_could_drop():
    with pytest.raises(ValueError, match="dropout=0.1, but adapter='randlora' has no"):
        lorax.Target("w", adapter="randlora", dropout=0.1)
