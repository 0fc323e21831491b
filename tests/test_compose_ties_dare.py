"""TIES and DARE against numpy written from the papers, and TIES against PEFT."""

import functools

import jax
import numpy as np
import pytest

import lorax
from lorax import compose
from tests import adapter_sets as make
from tests.programs import normal

WEIGHTS = [1.0, 0.5, -2.0]
STACK = {"batch": (3,)}
RANKS = (2, 1, 3)


def sets_of(shape, maker=make.lora):
    return [
        {"w": maker(seed, rank, 0.5 + seed, **shape)} for seed, rank in enumerate(RANKS)
    ]


def trimmed(delta, density):
    """The largest entries by magnitude, the rest zero."""
    kept = np.argsort(-np.abs(delta), axis=None)[: round(density * delta.size)]
    out = np.zeros(delta.size)
    out[kept] = delta.ravel()[kept]
    return out.reshape(delta.shape)


def elected_mean(deltas):
    out = np.zeros(deltas[0].shape)
    for place in np.ndindex(out.shape):
        values = [delta[place] for delta in deltas]
        sign = 1 if sum(values) >= 0 else -1
        agree = [value for value in values if value * sign > 0]
        out[place] = sum(agree) / len(agree) if agree else 0
    return out


def ties(deltas, weights, density):
    thin = [w * trimmed(d, density) for w, d in zip(weights, deltas)]
    return elected_mean(thin)


def test_ties_by_hand():
    deltas = [np.array([[4.0, -1.0, 2.0]]), np.array([[-3.0, 2.0, 0.1]])]
    # density 2/3 drops -1 and 0.1; signs: 4-3 > 0, 2 > 0, 2 > 0
    assert ties(deltas, [1, 1], 2 / 3).tolist() == [[4.0, 2.0, 2.0]]
    axes = lorax.Axes((0,), (1,))
    sets = [
        {"w": lorax.Lora(np.ones((1, 1), np.float32), np.float32(d), 1.0, axes)}
        for d in deltas
    ]
    adapters, _ = compose.combine(sets, [1, 1], "ties", density=2 / 3)
    make.close(make.delta(adapters["w"]), [[4.0, 2.0, 2.0]], 1e-6)


@pytest.mark.parametrize("maker", [make.lora, make.adalora])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_is_what_the_paper_says(density, maker):
    sets = sets_of({}, maker)
    got, error = compose.combine(sets, WEIGHTS, "ties", density=density, rank=5)
    want = ties([make.delta(s["w"]) for s in sets], WEIGHTS, density)
    make.close(make.delta(got["w"]), want)
    assert float(error["w"]) == 0 and got["w"].scale == sets[0]["w"].scale


def test_every_layer_of_a_stack_is_a_matrix_of_its_own():
    sets = sets_of(STACK)
    got, error = compose.combine(sets, WEIGHTS, "ties", density=0.5, rank=2)
    deltas = [make.delta(s["w"]) for s in sets]
    want = np.stack([ties([d[k] for d in deltas], WEIGHTS, 0.5) for k in range(3)])
    u, s, vt = np.linalg.svd(want, full_matrices=False)
    make.close(make.delta(got["w"]), (u[..., :2] * s[:, None, :2]) @ vt[:, :2])
    lost = np.sqrt((s[:, 2:] ** 2).sum() / (s**2).sum())
    np.testing.assert_allclose(error["w"], lost, rtol=1e-4)
    assert lost > 0.1


def test_the_default_rank_is_the_sum_at_most_that_of_the_kernel():
    sets = sets_of({"in_": (9,), "out": (8,)})
    got, _ = compose.combine(sets, WEIGHTS, "ties", density=0.5)
    assert got["w"].rank == 6
    got, _ = compose.combine(sets_of({}), WEIGHTS, "ties", density=0.5)
    assert got["w"].rank == 5


def test_a_set_of_weight_zero_has_no_say():
    sets = sets_of({})
    call = functools.partial(compose.combine, method="ties", density=0.5, rank=5)
    two, _ = call(sets[:2], [1.0, 0.5])
    three, _ = call(sets, [1.0, 0.5, 0.0])
    make.close(make.delta(three["w"]), make.delta(two["w"]), 1e-6)


def test_ties_is_pefts_at_equal_weights():
    torch = pytest.importorskip("torch")
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    sets = sets_of({})
    got, _ = compose.combine(sets, [0.7] * 3, "ties", density=0.5, rank=5)
    deltas = [torch.tensor(make.delta(s["w"])) for s in sets]
    want = merge_utils.ties(deltas, torch.full((3,), 0.7, dtype=torch.float64), 0.5)
    make.close(make.delta(got["w"]), want.numpy())


DARE = functools.partial(compose.combine, density=0.5, key=jax.random.key(3), rank=5)


def survivors(method, shape):
    """The result, and what it would be for every subset of sets that kept an entry."""
    sets = sets_of(shape)
    got, error = DARE(sets, WEIGHTS, method)
    deltas = [w * make.delta(s["w"]) / 0.5 for w, s in zip(WEIGHTS, sets)]
    subsets = np.array(np.meshgrid(*[[0, 1]] * 3)).reshape(3, -1).T
    add = elected_mean if method == "dare_ties" else sum
    options = np.stack([add([k * d for k, d in zip(s, deltas)]) for s in subsets])
    assert float(error["w"]) == 0
    return make.delta(got["w"]), options, subsets


@pytest.mark.parametrize("shape", [{}, STACK], ids=["matrix", "stack"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_or_drops_each_entry(method, shape):
    got, options, subsets = survivors(method, shape)
    miss = np.abs(options - got)
    assert miss.min(0).max() < 1e-5 * np.abs(got).max()
    if method == "dare_linear":  # there the subset can be read off
        kept = subsets[miss.argmin(0)].reshape(-1, 3).mean(0)
        assert (np.abs(kept - 0.5) < 0.25).all()
        rows = subsets[miss.argmin(0)].reshape(-1, 30, 3)
        assert len({row.tobytes() for row in rows.swapaxes(1, 2).reshape(-1, 30)}) == (
            rows.shape[0] * 3
        ), "two matrices drew one mask"


def test_dare_is_right_on_average():
    sets = sets_of({})
    draw = jax.jit(
        lambda key: (
            compose.combine(
                sets, WEIGHTS, "dare_linear", density=0.5, key=key, rank=5
            ).adapters
        )
    )
    draws = jax.vmap(draw)(jax.random.split(jax.random.key(0), 400))
    a, b = (np.asarray(f, np.float64) for f in (draws["w"].a, draws["w"].b))
    deltas = draws["w"].scale * (a @ b)
    exact = sum(w * make.delta(s["w"]) for w, s in zip(WEIGHTS, sets))
    spread = np.abs(deltas.mean(0) - exact) / (deltas.std(0) / 20 + 1e-9)
    assert spread.max() < 4.5  # standard errors, of 30 entries


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_at_density_one_drops_nothing(method):
    sets = sets_of({})
    got, _ = DARE(sets, WEIGHTS, method, density=1.0)
    deltas = [w * make.delta(s["w"]) for w, s in zip(WEIGHTS, sets)]
    want = sum(deltas) if method == "dare_linear" else elected_mean(deltas)
    make.close(make.delta(got["w"]), want)


def test_keys_come_from_path_and_set():
    sets = [{"v": s["w"], "w": s["w"]} for s in sets_of({})]
    got, _ = DARE(sets, WEIGHTS, "dare_linear")
    again, _ = DARE([{"w": s["w"]} for s in sets], WEIGHTS, "dare_linear")
    fewer, _ = DARE(sets[:2], WEIGHTS[:2], "dare_linear")
    none, _ = DARE(sets, [*WEIGHTS[:2], 0.0], "dare_linear")
    np.testing.assert_array_equal(got["w"].b, again["w"].b)
    assert np.abs(make.delta(got["w"]) - make.delta(got["v"])).max() > 0.1
    make.close(make.delta(fewer["w"]), make.delta(none["w"]), 1e-5)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_full_leaves_are_thinned_as_dense_changes(method):
    base, values = normal(1, 12), [normal(2, 12), normal(3, 12)]
    sets = [{"bias": lorax.Full(v)} for v in values]
    key = None if method == "ties" else jax.random.key(0)
    got, error = compose.combine(
        sets, [1.0, 0.5], method, density=0.5, key=key, params={"bias": base}
    )
    deltas = [np.asarray(v - base, np.float64) for v in values]
    moved = np.asarray(got["bias"].value - base)
    assert float(error["bias"]) == 0
    if method == "ties":
        make.close(moved, ties(deltas, [1.0, 0.5], 0.5))
        return
    masks = [(i, j) for i in (0, 2) for j in (0, 2)]
    options = [elected_mean([i * deltas[0], 0.5 * j * deltas[1]]) for i, j in masks]
    assert np.abs(np.stack(options) - moved).min(0).max() < 1e-5
    assert np.abs(moved).max() > 0.1
