"""The sketch of a gradient from thin backward passes, against the gradient itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from experiments.benchmarks.cases import measure
from tests import programs
from tests.test_inits import best, exact, first_step
from tests.test_linalg import captured, spectrum

KEY = jax.random.key(0)
RANK = 4
GA = lorax.Target("w", rank=RANK, alpha=RANK, init="lora_ga", options={"scale": "gd"})


def linear_loss(params, pair):
    """A loss whose gradient in w is exactly x^T y."""
    x, y = pair
    return jnp.sum((x @ params["w"]) * y)


def pair_of(gradient):
    """A batch whose gradient is the given matrix, as two thin factors of it."""
    u, s, vt = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    root = np.sqrt(s)[:, None]
    return jnp.asarray(root * u.T, jnp.float32), jnp.asarray(root * vt, jnp.float32)


@pytest.mark.parametrize("power,width", [(0.5, 12), (1, 4), (2, 4)])
def test_four_passes_are_as_good_as_the_exact_decomposition(power, width):
    gradient, s = spectrum(96, 64, power)
    params = {"w": programs.normal(0, 96, 64)}
    batches = [pair_of(gradient)]
    want = best(gradient, 2 * RANK)
    for method, bound in (("dense", 1e-3), ("sketch", None)):
        stats = lorax.calibrate(
            KEY, linear_loss, params, GA, batches, method=method, width=width
        )
        adapters, _ = lorax.init(KEY, params, GA, stats=stats)
        got = first_step(adapters["w"], gradient)
        if bound:
            assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)
        cosine = lambda x: np.sum(x * gradient) / np.linalg.norm(x)
        assert cosine(got) >= 0.999 * cosine(want)
        share = captured(gradient, stats["w"].u[:, : 2 * RANK])
        assert share >= 0.998 * np.sum(s[: 2 * RANK] ** 2) / np.sum(s**2)


def test_the_gradient_is_the_mean_over_batches():
    params = {"w": programs.normal(0, 16, 12)}
    target = lorax.Target("w", rank=6, init="lora_one")
    parts = [programs.normal(i, 16, 12) for i in (1, 2, 3)]
    stats = lorax.calibrate(
        KEY, linear_loss, params, target, iter(map(pair_of, parts)), method="dense"
    )
    got = stats["w"].u * stats["w"].s @ stats["w"].vt
    np.testing.assert_allclose(got, sum(parts) / 3, atol=1e-5)


def test_scanned_and_rematerialised_layers_as_the_dense_route():
    """All kernels at once, a loss with an auxiliary output, and one compilation."""
    program = programs.PROGRAMS["scanned_remat"]()
    traces = []

    def loss(params, x):
        traces.append(1)
        return program.fn(params, x), {"seen": x.shape}

    targets = [lorax.Target(".*kernel", rank=1, init="lora_ga")]
    kernels = lorax.discover(program.fn, program.params, *program.args)
    run = lambda method: lorax.calibrate(
        KEY, loss, program.params, targets, program.args * 2, kernels, method=method
    )
    sketch = run("sketch")
    assert len(traces) == 1, "four passes over two batches compile once"
    dense = run("dense")
    assert sketch.keys() == dense.keys() and len(sketch) == 2
    for path, want in dense.items():
        np.testing.assert_allclose(sketch[path].s, want.s, rtol=1e-3, atol=1e-5)
        product = lambda x: x.u * x.s[..., None, :] @ x.vt
        np.testing.assert_allclose(product(sketch[path]), product(want), atol=1e-4)
    adapters, params = lorax.init(KEY, program.params, targets, kernels, sketch)
    merged = lorax.merge(adapters, params)
    for got, leaf in zip(*map(jax.tree.leaves, (merged, program.params)), strict=True):
        np.testing.assert_allclose(got, leaf, atol=1e-5)


def test_kernels_of_every_shape():
    """Convolutions, embeddings, heads: flattened by the axes that discover finds."""
    targets = [lorax.Target(".*(kernel|embedding)", rank=1, init="lora_one")]
    for name in ("conv", "tied_embedding", "einsum"):
        program = programs.PROGRAMS[name]()
        kernels = lorax.discover(program.fn, program.params, *program.args)
        args = KEY, program.fn, program.params, targets, program.args, kernels
        sketch, dense = (lorax.calibrate(*args, method=m) for m in ("sketch", "dense"))
        for path, want in dense.items():
            np.testing.assert_allclose(
                sketch[path].s[..., 0], want.s[..., 0], rtol=1e-4
            )
            assert sketch[path].u.shape == want.u.shape


def test_sharded_parameters():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))
    params = {"w": programs.normal(0, 96, 64)}
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    gradient, _ = spectrum(96, 64, 1)
    batch = pair_of(gradient)
    here = lorax.calibrate(KEY, linear_loss, params, GA, [batch])
    there = lorax.calibrate(
        KEY, linear_loss, put(params, P("data", "tensor")), GA, [put(batch, P("data"))]
    )
    np.testing.assert_allclose(here["w"].s, there["w"].s, rtol=1e-4)


def test_a_pass_needs_the_memory_of_a_lora_backward_of_its_rank(monkeypatch):
    """And no array of the kernel's size but the kernel."""
    n, rank = 512, 4
    params = {"w1": jnp.ones((n, n)), "w2": jnp.ones((n, n))}
    loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["w1"]) @ params["w2"])
    x, temps, jit = jnp.ones((64, n)), [], jax.jit

    def spying(fn):
        """jax.jit that records the temporary memory of what it compiles."""
        jitted = jit(fn)

        def call(*args):
            temps.append(measure.cost(jitted.lower(*args).compile()).temp)
            return jitted(*args)

        return call

    lora, _ = lorax.init(KEY, params, lorax.Target("w.", rank=12 * rank))
    step = jit(jax.grad(lorax.adapt(loss)))
    lora_temp = measure.cost(step.lower(lora, params, x).compile()).temp
    monkeypatch.setattr(jax, "jit", spying)
    target = lorax.Target("w.", rank=rank, init="lora_ga")
    lorax.calibrate(KEY, loss, params, target, [x])
    assert len(temps) == 4 and max(temps) <= 1.2 * lora_temp
    assert max(temps) < 4 * n * n, "an [in, out] array"


def test_bad_input():
    params = {"w": jnp.ones((8, 6))}
    call = lambda targets=GA, batches=(), **more: lorax.calibrate(
        KEY, linear_loss, params, targets, batches, **more
    )
    with pytest.raises(ValueError, match="batches is empty: give at least one batch"):
        call()
    with pytest.raises(ValueError, match="no target has an init that looks at data"):
        call(lorax.Target("w", rank=2))
    with pytest.raises(ValueError, match="passes=3; give an even number"):
        call(passes=3)
    with pytest.raises(ValueError, match="width=1; give a whole number"):
        call(width=1)
    with pytest.raises(ValueError, match="method='svd'; choose"):
        call(method="svd")
    with pytest.raises(ValueError, match="matches no leaf"):
        call(lorax.Target("v", rank=2, init="lora_ga"))
    assert exact(params["w"]).s.shape == (6,)


class Pair(NamedTuple):
    """A batch as a named tuple."""

    x: jax.Array
    y: jax.Array


X, Y = jnp.ones((4, 8)), jnp.zeros(4, jnp.int32)


@pytest.mark.parametrize(
    "batches,form",
    [
        ({"x": X, "y": Y}, r"\{'x': 'float32\[:, :\]', 'y': 'int32\[:\]'\}"),
        (X, r"float32\[:, :\]"),
        (Pair(X, Y), "Pair"),
        (3.0, "float"),
        (None, "None"),
    ],
)
def test_one_batch_in_place_of_a_list(batches, form):
    call = lambda batches: lorax.calibrate(
        KEY, linear_loss, {"w": jnp.ones((8, 6))}, GA, batches
    )
    with pytest.raises(
        TypeError, match=rf"batches is a single batch, .*{form}.*\[batch\]"
    ):
        call(batches)


def test_the_parts_of_one_batch_in_place_of_batches():
    call = lambda batches: lorax.calibrate(
        KEY, linear_loss, {"w": jnp.ones((8, 6))}, GA, batches
    )
    with pytest.raises(
        ValueError, match=r"batches\[1\] is int32\[:\], .*give \[\(first"
    ):
        call([X, Y])
    with pytest.raises(
        ValueError, match=r"batches\[1\] is int32\[:\], .*give \[\(first"
    ):
        call((X, Y))
    with pytest.raises(ValueError, match=r"batches\[2\] is \{'x'"):
        call([X, X[:2], {"x": X}])
