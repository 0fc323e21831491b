"""Random convolutions of an adapted kernel: adapt is merge-then-apply, exactly."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import lorax
from tests import programs
from tests.random_adapters import adapter_of
from tests.test_random_programs import SETTINGS


@st.composite
def convolutions(draw):
    """Draws groups, inputs and outputs per group, the window, and how it moves."""
    of = lambda *choices: draw(st.sampled_from(choices))
    groups, in_, out = of(1, 2, 3), of(1, 2, 3), of(1, 2)
    how = {
        "window_strides": (of(1, 2),),
        "padding": of("SAME", "VALID"),
        "rhs_dilation": (of(1, 2),),
        "dimension_numbers": ("NWC", of("WIO", "IOW", "OWI"), "NWC"),
    }
    return groups, in_, out, of(1, 2, 3), how


def check_convolution(drawn, rank, edit):
    """Checks a kernel `[window, in, out]`, edited, laid out as drawn, and convolved."""
    groups, in_, out, window, how = drawn
    order = ["WIO".index(letter) for letter in how["dimension_numbers"][1]]

    def fn(params, x):
        w = (params["w0"], -params["w0"], params["w0"][::-1], 2 * params["w0"])[edit]
        y = jax.lax.conv_general_dilated(
            x, w.transpose(order), feature_group_count=groups, **how
        )
        return jnp.sum(jnp.sin(y))

    with jax.enable_x64(True):
        shape, draw = (window, in_, groups * out), np.random.RandomState(5).randn
        dims = [*zip(("in", "in", "out"), shape, strict=True)]
        params, x = {"w0": draw(*shape)}, draw(2, 7, groups * in_)
        adapters = {"w0": adapter_of(dims, rank, 1)}
        got, want = (
            jax.jit(jax.value_and_grad(side))(adapters, params, x)
            for side in (lorax.adapt(fn, on_merge="error"), programs.definition(fn))
        )
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9)


a_convolution = convolutions(), st.integers(1, 3), st.integers(0, 3)
test_convolutions_merge_nothing = settings(max_examples=8, **SETTINGS)(
    given(*a_convolution)(check_convolution)
)
test_many_more_convolutions = pytest.mark.slow(
    settings(max_examples=150, **SETTINGS)(given(*a_convolution)(check_convolution))
)
