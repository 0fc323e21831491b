"""LoHa: the Hadamard product and its gradients in numpy, its start, and its width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.adapters import reference

TARGET = lorax.Target("w", rank=2, alpha=3, adapter="loha")


def test_update_and_gradients_by_hand():
    """dW1 = s G * (a2 b2), and each pair's chain rule from there."""
    case = reference.case(TARGET)
    a1, b1, a2, b2 = (case.fields[name] for name in ("a1", "b1", "a2", "b2"))
    one, two, s = a1 @ b1, a2 @ b2, 1.5
    reference.assert_close(case.delta, s * one * two, 1e-5)
    first, second = s * case.cotangent * two, s * case.cotangent * one
    expected = {
        "a1": first @ b1.T,
        "b1": a1.T @ first,
        "a2": second @ b2.T,
        "b2": a2.T @ second,
    }
    reference.assert_gradients(case, expected)


def test_the_rank_is_that_of_its_square():
    case = reference.case(TARGET, (20, 15))
    assert np.linalg.matrix_rank(case.delta, tol=1e-5) == 4


def test_the_start():
    params = {"w": jnp.ones((400, 300))}
    target = lorax.Target("w", rank=5, adapter="loha")
    adapter = lorax.init(jax.random.key(0), params, target)[0]["w"]
    assert not adapter.a2.any() and adapter.scale == 16 / 5
    for name, bound in (("a1", 1 / 20), ("b1", 5**-0.5), ("b2", 5**-0.5)):
        array = np.asarray(getattr(adapter, name))
        assert np.abs(array).max() <= bound
        np.testing.assert_allclose(array.std(), bound / np.sqrt(3), rtol=0.05)


def test_what_is_as_wide_as_the_kernel_is_merged_aloud():
    params = {"w": jnp.ones((9, 12))}
    target = lorax.Target("w", rank=3, adapter="loha")
    adapters, params = lorax.init(jax.random.key(0), params, target)
    fn = lambda params, x: x @ params["w"]
    with pytest.warns(lorax.MergeWarning, match="LoHa has no form for a linear"):
        lorax.adapt(fn)(adapters, params, jnp.ones((2, 9)))
    with pytest.warns(lorax.MergeWarning):
        case = reference.case(target, (9, 12), on_merge="warn")
    one, two = (case.fields[f"a{i}"] @ case.fields[f"b{i}"] for i in (1, 2))
    reference.assert_close(case.delta, 16 / 3 * one * two, 1e-5)
