"""Linear combinations: exact updates, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import compose
from tests import adapter_sets as make
from tests.programs import normal

CONV = {"in_": (3, 4), "out": (5,)}
STACK = {"batch": (3,), "in_": (6,), "out": (2, 2)}


def test_a_sum_by_hand():
    axes = lorax.Axes((0,), (1,))
    one = lorax.Lora(jnp.array([[1.0], [0.0]]), jnp.array([[3.0]]), 2.0, axes)
    two = lorax.Lora(jnp.array([[0.0], [1.0]]), jnp.array([[5.0]]), 4.0, axes)
    adapters, error = compose.combine([{"w": one}, {"w": two}], [1.0, 0.5])
    assert adapters["w"].a.tolist() == [[1, 0], [0, 1]]
    assert adapters["w"].b.tolist() == [[3], [5]]  # 0.5 * 4 / 2 * 5
    assert adapters["w"].scale == 2.0 and error == {"w": 0.0}


@pytest.mark.parametrize("shape", [{}, CONV, STACK], ids=["matrix", "conv", "stack"])
@pytest.mark.parametrize("makers", [(make.lora,) * 2, (make.lora, make.adalora)])
def test_linear_adds_updates_without_cross_terms(makers, shape):
    sets = [
        {"w": maker(seed, rank, scale, **shape)}
        for maker, seed, rank, scale in zip(makers, (1, 2), (2, 3), (1.5, -0.5))
    ]
    adapters, error = compose.combine(sets, [1, 1])
    want = [make.delta(s["w"]) for s in sets]
    make.close(make.delta(adapters["w"]), want[0] + want[1], 1e-6)
    assert type(adapters["w"]) is lorax.Lora and adapters["w"].rank == 5
    assert float(error["w"]) == 0
    adapters, _ = compose.combine(sets, jnp.array([0.25, -3.0]))
    make.close(make.delta(adapters["w"]), 0.25 * want[0] - 3 * want[1], 1e-6)


@pytest.mark.parametrize("maker", [make.lora, make.adalora])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("jit", [False, True])
def test_an_adapter_less_itself_is_exactly_nothing(maker, weight, jit):
    x = {"w": maker(1, 3, 0.7, **STACK)}
    less = lambda x: compose.combine([x, x], [weight, -weight]).adapters
    adapters = (jax.jit(less) if jit else less)(x)
    assert adapters["w"].rank == 3 and not adapters["w"].b.any()
    copy = jax.tree.map(jnp.array, x)  # equal, not identical
    adapters, _ = compose.combine([x, copy], [weight, -weight])
    assert adapters["w"].rank == 3 and not adapters["w"].b.any()


def test_equal_a_is_read_once():
    """Sets trained with a frozen `a`: the rank of the sum is that of one set."""
    x, y = make.lora(1, 2, 1.5), make.lora(2, 2, 0.5)
    y = y.replace(a=jnp.array(x.a))
    adapters, _ = compose.combine([{"w": x}, {"w": y}], [2, 3])
    assert adapters["w"].rank == 2
    make.close(make.delta(adapters["w"]), 2 * make.delta(x) + 3 * make.delta(y), 1e-6)


def test_a_path_that_a_set_lacks_has_no_update_there():
    x, y = {"w": make.lora(1), "v": make.lora(2)}, {"v": make.lora(3)}
    adapters, error = compose.combine([x, y], [2.0, 1.0])
    assert list(adapters) == list(error) == ["v", "w"]
    make.close(make.delta(adapters["w"]), 2 * make.delta(x["w"]), 1e-6)


def test_layers_are_united():
    shape = {"in_": (6,), "out": (5,)}
    x = make.lora(1, batch=(2,), layers=(0, 2), **shape)
    y = make.lora(2, batch=(2,), layers=(2, 3), **shape)
    whole = make.lora(3, batch=(4,), **shape)
    base = jnp.zeros((4, 6, 5))
    total = lambda *sets: compose.combine([{"w": s} for s in sets], [1, -2])[0]["w"]
    spread = lambda x: np.asarray(x.delta(base), np.float64)
    adapter = total(x, y)
    assert adapter.layers == (0, 2, 3)
    make.close(adapter.delta(base), spread(x) - 2 * spread(y), 1e-6)
    adapter = total(x, whole)
    assert adapter.layers is None
    make.close(adapter.delta(base), spread(x) - 2 * spread(whole), 1e-6)
    short = make.lora(4, batch=(2,), **shape)
    with pytest.raises(
        ValueError, match=r"w: one set adapts a stack of 2 layers.*2, 3"
    ):
        total(y, short)


def test_bf16_factors_add_in_float32():
    half = lambda s: jax.tree.map(lambda v: v.astype(jnp.bfloat16), {"w": make.lora(s)})
    sets = [half(1), half(2)]
    adapters, _ = compose.combine(sets, [1.0, 1.0])
    assert adapters["w"].b.dtype == adapters["w"].a.dtype == jnp.float32
    want = sum(make.delta(s["w"]) for s in sets)
    make.close(make.delta(adapters["w"]), want, 1e-6)


@pytest.mark.parametrize("shape", [{}, CONV, STACK], ids=["matrix", "conv", "stack"])
def test_svd_is_the_best_approximation_and_reports_its_error(shape):
    sets = [{"w": make.lora(seed, 2, **shape)} for seed in (1, 2)]
    adapters, error = compose.combine(sets, [1, -1], "svd", rank=3)
    n = len(shape.get("batch", ()))
    want = make.delta(sets[0]["w"]) - make.delta(sets[1]["w"])
    rows = int(np.prod(want.shape[n : n + len(shape.get("in_", (0,)))]))
    flat = want.reshape(*want.shape[:n], rows, -1)
    u, s, vt = np.linalg.svd(flat, full_matrices=False)
    best = (u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]
    make.close(make.delta(adapters["w"]).reshape(flat.shape), best)
    lost = np.linalg.norm(flat - best) / np.linalg.norm(flat)
    np.testing.assert_allclose(error["w"], lost, rtol=1e-4)
    assert adapters["w"].rank == 3 and lost > 0.01
    whole, error = compose.combine(sets, [1, -1], "svd")
    assert whole["w"].rank == 4 and float(error["w"]) < 1e-6
    make.close(make.delta(whole["w"]), want)


def test_svd_caps_the_rank_at_that_of_the_kernel():
    sets = [{"w": make.lora(seed, 4)} for seed in (1, 2)]
    adapters, error = compose.combine(sets, [1, 1], "svd")
    assert adapters["w"].rank == 5 and float(error["w"]) < 1e-6
    make.close(make.delta(adapters["w"]), sum(make.delta(s["w"]) for s in sets))


def test_full_leaves_move_by_their_changes():
    base = {"bias": normal(1, 5), "w": normal(2, 6, 5)}
    values = [normal(3, 5), normal(4, 5)]
    sets = [{"bias": lorax.Full(v), "w": make.lora(i)} for i, v in enumerate(values)]
    call = functools.partial(compose.combine, sets, [0.5, -2.0])
    adapters, error = call(params=base)
    b, (v1, v2) = base["bias"], values
    make.close(adapters["bias"].value, b + 0.5 * (v1 - b) - 2 * (v2 - b), 1e-6)
    assert float(error["bias"]) == 0
    same, _ = compose.combine([sets[0]] * 2, [1, -1], params=base)
    np.testing.assert_array_equal(same["bias"].value, base["bias"])
    with pytest.raises(ValueError, match=r"bias is Full.*pass params="):
        call()
    with pytest.raises(ValueError, match=r"bias: the adapter holds a value of shape"):
        call(params={"bias": jnp.ones(4)})
    with pytest.raises(KeyError, match="no leaf 'bias'"):
        call(params={"bia": b})


def test_combine_runs_under_jit_with_traced_weights():
    sets = [{"w": make.lora(seed)} for seed in (1, 2)]
    merge = jax.jit(lambda sets, w: compose.combine(sets, w, "svd", rank=2).adapters)
    want = [make.delta(s["w"]) for s in sets]
    for weights in ([1.0, 0.0], [0.0, 2.0]):
        got = make.delta(merge(sets, jnp.array(weights))["w"])
        make.close(got, weights[0] * want[0] + weights[1] * want[1])


X, Y = {"w": make.lora(1)}, {"w": make.lora(2)}


@pytest.mark.parametrize(
    "sets,message",
    [
        ([X, {"v": make.lora(1)}], r"set 0 .*\['w'\].* shares none .*\['v'\].*combine"),
        ([X, {"w": make.lora(1, out=(4,))}], r"w: set 0 .*out \(5,\).*set 1 .*\(4,\)"),
        ([X, {"w": lorax.Full(jnp.ones((6, 5)))}], "w: set 0 has Lora.*set 1 Full"),
        ([X, {"w": make.dora(1)}], r"\['w'\] are Dora.*merge each .*compose.extract"),
        ([make.lora(1)], None),
    ],
)
def test_sets_that_cannot_be_added(sets, message):
    kind = ValueError if message else TypeError
    with pytest.raises(kind, match=message or "sets must be a list of adapter d"):
        compose.combine(sets, [1] * len(sets))


@pytest.mark.parametrize(
    "weights,options,message",
    [
        ([1], {}, "1 weights for 2 sets"),
        ([1, np.inf], {}, r"weights\[1\] is inf"),
        ([1, 1], {"method": "mean"}, "method='mean'; choose one of linear, svd"),
        ([1, 1], {"rank": 2}, "rank=2: a linear combination is exact.*'svd'"),
        ([1, 1], {"method": "svd", "rank": 6}, "w: rank=6 .*6 inputs and 5 outputs"),
        ([1, 1], {"method": "svd", "rank": 0}, "w: rank=0 .*from 1 to 5"),
        ([1, 1], {"method": "ties", "rank": 9, "density": 1.0}, "w: rank=9"),
        ([1, 1], {"method": "ties"}, r"density=None; method='ties' needs.*\(0, 1\]"),
        ([1, 1], {"method": "ties", "density": 0.0}, r"density=0.0; .*\(0, 1\]"),
        ([1, 1], {"method": "dare_ties", "density": 1.5}, r"density=1.5; .*\(0, 1\]"),
        ([1, 1], {"density": 0.5}, "density=0.5: method='linear' keeps every"),
        ([1, 1], {"election": "plain"}, "election='plain'; choose one of weighted, un"),
        (
            [1, 1],
            {"method": "dare_linear", "density": 0.5, "election": "unweighted"},
            "election='unweighted': method='dare_linear' elects no signs; .*dare_ties",
        ),
        (
            [1, 1],
            {"method": "dare_linear", "density": 0.5},
            r"method='dare_linear' drops .*pass key=jax.random.key",
        ),
        (
            [1, 1],
            {"method": "ties", "density": 0.5, "key": jax.random.key(0)},
            "method='ties' is not random",
        ),
    ],
)
def test_options_that_do_not_fit(weights, options, message):
    with pytest.raises(ValueError, match=message):
        compose.combine([X, Y], weights, **options)
