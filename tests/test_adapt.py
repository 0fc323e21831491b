"""adapt is what merge defines, at the price of hand-written LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests import programs


def setup(name):
    program = programs.PROGRAMS[name]()
    kernels = lorax.discover(program.fn, program.params, *program.args)
    adapters, params = lorax.init(
        jax.random.key(0), program.params, program.targets, kernels
    )
    return program, kernels, programs.perturbed(adapters), params


def assert_close(got, want, tolerance=1e-5):
    """Relative to the norm of the whole tree: some gradients are zero by symmetry."""
    got, want = (jax.tree.leaves(tree) for tree in (got, want))
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(w))) for w in want))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert float(jnp.max(jnp.abs(g - w), initial=0)) <= tolerance * norm


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_adapt_is_merge_then_apply_and_merges_nothing(name):
    program, kernels, adapters, params = setup(name)
    adapted = lorax.adapt(program.fn, on_merge="error")
    got = programs.loss_and_grad(adapted, adapters, params, *program.args)
    want = programs.loss_and_grad(
        programs.definition(program.fn), adapters, params, *program.args
    )
    assert_close(got, want)
    moved = jnp.abs(got[0] - program.fn(params, *program.args))
    assert moved > 1e-3 * jnp.abs(got[0]), "the adapters did nothing"
