"""MiSS: shards written out in numpy, whether or not the rank divides the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.adapters import reference


@pytest.mark.parametrize("rank", [2, 3, 7])
def test_update_and_gradients_by_hand(rank):
    """Row i of the update is row i mod r of D; its gradient sums those rows of G."""
    target = lorax.Target("w", rank=rank, adapter="miss")
    case = reference.case(target, (7, 4))
    rows = [i % rank for i in range(7)]
    reference.assert_close(case.delta, case.fields["block"][rows], 1e-5)
    gradient = np.zeros((rank, 4))
    for i, row in enumerate(rows):
        gradient[row] += case.cotangent[i]
    reference.assert_gradients(case, {"block": gradient})
    assert case.adapter.scale == 1, "there is no alpha"


def test_no_shard_is_longer_than_the_input():
    target = lorax.Target("w", rank=8, adapter="miss")
    with pytest.raises(ValueError, match="rank"):
        lorax.init(jax.random.key(0), {"w": jnp.ones((7, 9))}, target)
    lorax.init(jax.random.key(0), {"w": jnp.ones((9, 2))}, target)
