"""The inputs of kernels, accumulated through gradients, against rows by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lorax
from lorax.activations import components, probes
from lorax.selection import select
from tests import programs

KEY = jax.random.key(0)
EVA = functools.partial(lorax.Target, rank=2, alpha=2, init="eva")
CORDA = functools.partial(EVA, init="corda")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time of these toys would go into optimising their programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def calibrated(fn, params, target, *batches, **options):
    kernels = lorax.discover(fn, params, batches[0])
    return lorax.calibrate(KEY, fn, params, target, batches, kernels, **options)


def check(stats, rows, atol=1e-5):
    """Compares the covariance of one kernel with its rows in float64."""
    x = np.asarray(rows, np.float64)
    assert stats.tokens == len(x)
    np.testing.assert_allclose(stats.matrix, x.T @ x / len(x), atol=atol, rtol=1e-5)


def principal(rows):
    """Components, standard deviations and the variance, in float64."""
    x = np.asarray(rows, np.float64)
    _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return vt, s / np.sqrt(len(x)), x.var(0).sum()


def chain(params, x):
    """Two layers; the loss reads the sum of both uses of the first."""
    h = jnp.tanh(x @ params["w"])
    return jnp.sum(jnp.tanh(h @ params["v"] + jnp.sin(x) @ params["w"]) ** 2)


CHAIN = {"w": programs.normal(1, 6, 5), "v": programs.normal(2, 5, 5) / 2}
X = programs.normal(0, 2, 7, 6) + 1
Y = 3 * programs.normal(3, 1, 4, 6)


def rows_of(*batches):
    return np.concatenate([np.asarray(x).reshape(-1, 6) for x in batches])


def test_a_covariance_counts_every_use_of_every_batch():
    stats = calibrated(chain, CHAIN, CORDA("[wv]"), X, Y)
    x = rows_of(X, Y)
    check(stats["w"], np.concatenate([x, np.sin(x)]))
    check(stats["v"], np.tanh(x @ CHAIN["w"]))


@pytest.mark.parametrize("method", ["sketch", "dense"])
def test_components_are_those_of_all_batches_together(method):
    stats = calibrated(chain, CHAIN, EVA("[wv]"), X, Y, method=method)
    x = rows_of(X, Y)
    for path, rows in (("w", [x, np.sin(x)]), ("v", [np.tanh(x @ CHAIN["w"])])):
        vt, s, variance = principal(np.concatenate(rows))
        found = stats[path]
        assert found.u.shape == (len(CHAIN[path]), 4)
        np.testing.assert_allclose(found.s, s[:4], rtol=1e-4)
        np.testing.assert_allclose(found.variance, variance, rtol=1e-5)
        np.testing.assert_allclose(np.abs(vt[:4] @ found.u), np.eye(4), atol=2e-3)


def test_every_layer_of_a_scan_has_its_own():
    """Scanned and rematerialised, and for a subset of the layers."""
    w = programs.normal(1, 3, 4, 4) / 2

    @jax.checkpoint
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    fn = lambda params, x: jnp.sum(jax.lax.scan(layer, x, params["w"])[0] ** 2)
    x = np.asarray(programs.normal(0, 9, 4), np.float64)
    rows = []
    for own in np.asarray(w):
        rows.append(x)
        x = x + np.tanh(x @ own)
    stats = calibrated(fn, {"w": w}, CORDA("w"), jnp.asarray(rows[0], jnp.float32))
    some = calibrated(
        fn, {"w": w}, CORDA("w", layers=(0, 2)), jnp.asarray(rows[0], jnp.float32)
    )
    one = lambda stats, i: type(stats)(*(leaf[i] for leaf in stats))
    for i in range(3):
        check(one(stats["w"], i), rows[i])
    for i, layer_ in enumerate((0, 2)):
        check(one(some["w"], i), rows[layer_])


def test_a_token_counts_for_the_expert_that_gets_it():
    """Every expert sees every token, and the gate drops all results but one."""
    w, x = programs.normal(1, 3, 4, 5), programs.normal(0, 8, 4)
    gate = jax.nn.one_hot(jnp.array([0, 2, 0, 2, 2, 0, 0, 2]), 3)

    def fn(params, x):
        y = jnp.tanh(jnp.einsum("td,edf->tef", x, params["w"]))
        return jnp.sum(jnp.einsum("tef,te->tf", y, gate) ** 2)

    target = CORDA("w", batch_axes=(0,))
    stats = calibrated(fn, {"w": w}, target, x)["w"]
    np.testing.assert_array_equal(stats.tokens, [4, 0, 4])
    for e in (0, 2):
        own = np.asarray(x, np.float64)[np.asarray(gate[:, e]) > 0]
        np.testing.assert_allclose(stats.matrix[e], own.T @ own / 4, atol=1e-5)
    np.testing.assert_array_equal(stats.matrix[1], 0)
    every = calibrated(fn, {"w": w}, target, x, tokens="all")["w"]
    np.testing.assert_array_equal(every.tokens, [8, 8, 8])


def test_padding_counts_only_where_all_tokens_do():
    """After causal attention, nothing attends to it and the loss ignores it."""
    names = "q k v o".split()
    params = {name: programs.normal(i, 4, 4) for i, name in enumerate(names)}

    def fn(params, batch):
        x, weights = batch
        q, k, v = (x @ params[name] for name in "qkv")
        scores = jnp.where(jnp.tril(jnp.ones((6, 6))) > 0, q @ k.mT, -1e9)
        y = (jax.nn.softmax(scores) @ v) @ params["o"]
        return jnp.sum(jnp.tanh(y) ** 2 * weights[..., None])

    x = programs.normal(9, 2, 6, 4)
    length = np.array([6, 3])
    weights = jnp.asarray(np.arange(6) < length[:, None], jnp.float32)
    stats = calibrated(fn, params, CORDA("[qkvo]"), (x, weights))
    kept = np.asarray(x)[np.asarray(weights) > 0]
    for name in "kv":
        check(stats[name], kept)
    assert stats["o"].tokens == 9 and stats["q"].tokens == 7
    # with a single key, the first position's query decides nothing
    later = (np.arange(6) > 0) & (np.asarray(weights) > 0)
    check(stats["q"], np.asarray(x)[later])
    every = calibrated(fn, params, CORDA("[qkvo]"), (x, weights), tokens="all")
    check(every["v"], np.asarray(x).reshape(-1, 4))


def test_windows_of_a_convolution():
    x = programs.normal(0, 2, 7, 3)
    conv = lambda params, x: jax.lax.conv_general_dilated(
        x, params["w"], (2,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")
    )
    fn = lambda params, x: jnp.sum(jnp.tanh(conv(params, x)) ** 2)
    stats = calibrated(fn, {"w": programs.normal(1, 3, 3, 4)}, CORDA("w"), x)["w"]
    windows = [np.asarray(x)[:, i : i + 3].reshape(2, 9) for i in (0, 2, 4)]
    check(stats, np.concatenate(windows))


def test_groups_of_a_ragged_dot():
    x, w = programs.normal(0, 8, 4), programs.normal(1, 3, 4, 6)
    groups = jnp.array([3, 0, 5])
    fn = lambda params, x: jnp.sum(
        jnp.tanh(jax.lax.ragged_dot(x, params["w"], groups)) ** 2
    )
    stats = calibrated(fn, {"w": w}, CORDA("w"), x)["w"]
    np.testing.assert_array_equal(stats.tokens, [3, 0, 5])
    for e, own in ((0, x[:3]), (2, x[3:])):
        own = np.asarray(own, np.float64)
        np.testing.assert_allclose(stats.matrix[e], own.T @ own / len(own), atol=1e-5)


def test_a_kernel_scaled_along_its_inputs_reads_them_scaled():
    """x @ (v * w) is (x * v) @ w; scaled along outputs or by a number, it reads x."""
    v = jnp.array([2.0, 0.5, 0.0, 1.0])
    fn = lambda params, x: jnp.sum(
        jnp.tanh(x @ (v[:, None] * params["w"] * 3 * jnp.arange(1.0, 6)))
    )
    x = programs.normal(0, 9, 4) + 1
    params = {"w": programs.normal(1, 4, 5)}
    check(calibrated(fn, params, CORDA("w"), x)["w"], np.asarray(x * v))
    _, s, variance = principal(x * v)
    found = calibrated(fn, params, EVA("w", rank=1), x)["w"]
    np.testing.assert_allclose(found.variance, variance, rtol=1e-5)
    np.testing.assert_allclose(found.s, s[:2], rtol=1e-4)


def test_fused_kernels_and_transposed_uses():
    """One product for two kernels; a transposed use reads outputs and is left out."""
    params = {"q": programs.normal(1, 4, 4), "v": programs.normal(2, 4, 3)}

    def fn(params, x):
        y = x @ jnp.concatenate([params["q"], params["v"]], axis=1)
        back = jnp.tanh(y[:, :4]) @ params["q"].T
        return jnp.sum(jnp.sin(back) ** 2) + jnp.sum(y[:5, 4:] ** 2)

    x = programs.normal(0, 9, 4)
    stats = calibrated(fn, params, CORDA("[qv]"), x)
    check(stats["q"], x)
    check(stats["v"], x[:5])  # the rows of its part that the loss sees


def test_low_precision_is_summed_in_float32():
    x = (programs.normal(0, 300, 6) + 1).astype(jnp.bfloat16)
    params = {"w": programs.normal(1, 6, 5).astype(jnp.bfloat16)}
    fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]).astype(jnp.float32))
    stats = calibrated(fn, params, CORDA("w"), x, tokens="all")["w"]
    assert stats.matrix.dtype == jnp.float32
    check(stats, np.asarray(x, np.float64), atol=1e-6)


@pytest.mark.parametrize("kind", ["auto", "explicit", "manual", "unchecked"])
def test_tokens_on_a_mesh(kind):
    axis = jax.sharding.AxisType
    own = axis.Explicit if kind == "explicit" else axis.Auto
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(own, own))
    fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]) ** 2)
    if kind in ("manual", "unchecked"):

        def local(w, x):
            return jax.lax.psum(jnp.sum(jnp.tanh(x @ w) ** 2), "x")

        shards = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P("x")),
            out_specs=P(),
            check_vma=kind == "manual",
        )
        fn = lambda params, x: shards(params["w"], x)
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
    x, w = programs.normal(0, 8, 6), programs.normal(1, 6, 4)
    with jax.set_mesh(mesh):
        whole = kind in ("manual", "unchecked")
        params = {"w": put(w) if whole else put(w, None, "y")}
        batch = put(x, "x")
        moments = calibrated(fn, params, CORDA("w"), batch)["w"]
        found = calibrated(fn, params, EVA("w"), batch)["w"]
    copies = 2 if kind == "unchecked" else 1  # the types do not distinguish them
    check(moments._replace(tokens=moments.tokens / copies), x)
    np.testing.assert_allclose(found.s, principal(x)[1][:4], rtol=1e-4)


def test_one_pass_needs_the_memory_of_a_lora_backward():
    """No array of the covariance's size, and none of the kernel's but the kernel."""
    n, rank = 512, 4
    params = {"w1": jnp.ones((n, n)), "w2": jnp.ones((n, n))}
    loss = lambda params, x: jnp.sum(jnp.tanh(x @ params["w1"]) @ params["w2"])
    chosen = select(params, EVA("w.", rank=rank))
    q = {p: probes.probe(k, t, jnp.ones((n, 48))) for p, (t, k) in chosen.items()}
    step = jax.jit(jax.grad(probes.observed(loss, chosen, False)))
    memory = step.lower(q, params, jnp.ones((64, n))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * n * n


def test_bad_input(monkeypatch):
    call = functools.partial(calibrated, chain, CHAIN)
    with pytest.raises(ValueError, match="tokens='some'; choose 'reached' or 'all'"):
        call(EVA("w"), X, tokens="some")
    with pytest.raises(ValueError, match="init='lora_ga' or 'lora_one' or .*'eva' or"):
        call(lorax.Target("w", rank=2), X)
    monkeypatch.setattr(components, "LIMIT", 4 * 60)
    with pytest.raises(ValueError, match=r"w: the covar.*\[6, 6\].*targets at a time"):
        call(CORDA("[wv]"), X)
    call(EVA("[wv]"), X)
    with pytest.raises(ValueError, match="w: no row that the kernel reads was counted"):
        still = lambda p, x: jnp.sum(x @ jax.lax.stop_gradient(p["w"]))
        calibrated(still, CHAIN, EVA("w"), X)


@jax.custom_vjp
def straight(x, w):
    return x @ w


straight.defvjp(lambda x, w: (x @ w, w), lambda w, g: (g @ w.T, 0 * w))


def test_a_derivative_rule_of_the_programs_own_keeps_its_inputs_in_sight():
    fn = lambda params, x: jnp.sum(jnp.tanh(straight(jnp.sin(x), params["w"])) ** 2)
    stats = calibrated(fn, CHAIN, CORDA("w"), rows_of(X))
    check(stats["w"], np.sin(rows_of(X)))


@jax.custom_jvp
def hidden(x, w):
    return x @ jnp.tanh(w)


hidden.defjvp(lambda primals, tangents: (hidden(*primals), hidden(*primals)))

REFUSED = {
    "looks rows up by index": lambda p, x: jnp.sum(jnp.tanh(p["w"][x[0, :3, 0] > 0])),
    "reads only a part of the kernel's inputs": lambda p, x: jnp.sum(
        jnp.tanh(x[..., :3] @ p["w"][:3]) + x[..., 3:] @ p["w"][3:]
    ),
    "hides what the kernel reads": lambda p, x: jnp.sum(
        straight(x[0], jnp.tanh(p["w"])) + hidden(x[0], p["w"])
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_told_is_refused_by_name(why):
    fn = REFUSED[why]
    if "rows" in why:
        fn = lambda p, x: jnp.sum(jnp.tanh(p["w"][jnp.array([0, 1])] + x[0, 0, :5]))
    with pytest.raises(ValueError, match=f"w: .* at .*{why}.*another init"):
        lorax.calibrate(KEY, fn, CHAIN, EVA("w"), [X])
