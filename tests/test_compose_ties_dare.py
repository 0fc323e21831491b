"""TIES and DARE against numpy versions of the papers, and TIES against PEFT."""

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
    """Keeps the largest entries by magnitude and zeros the rest."""
    kept = np.argsort(-np.abs(delta), axis=None)[: round(density * delta.size)]
    out = np.zeros(delta.size)
    out[kept] = delta.ravel()[kept]
    return out.reshape(delta.shape)


def elected_mean(deltas, voters=None):
    out = np.zeros(deltas[0].shape)
    for place in np.ndindex(out.shape):
        values = [delta[place] for delta in deltas]
        votes = values if voters is None else [voter[place] for voter in voters]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [value for value, vote in zip(values, votes) if vote * sign > 0]
        out[place] = sum(agree) / len(agree) if agree else 0
    return out


def ties(deltas, weights, density, election="weighted"):
    thin = [trimmed(d, density) for d in deltas]
    weighted = [w * d for w, d in zip(weights, thin)]
    return elected_mean(weighted, None if election == "weighted" else thin)


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


@pytest.mark.parametrize(
    "weights,weighted,unweighted",
    [
        ([1.0, 1.0], [4.0, 2.0], [4.0, 2.0]),
        ([0.5, 0.5], [2.0, 1.0], [2.0, 1.0]),
        # 4 - 3 > 0 but 4 - 6 < 0; -1 + 2 > 0 and -1 + 4 > 0
        ([1.0, 2.0], [-6.0, 4.0], [4.0, 4.0]),
        ([1.0, 0.0], [4.0, -1.0], [4.0, 0.0]),
        # with the second's sign flipped: (4 + 3) / 2, (-1 - 2) / 2
        ([1.0, -1.0], [3.5, -1.5], [4.0, -2.0]),
    ],
)
def test_both_elections_by_hand(weights, weighted, unweighted):
    axes = lorax.Axes((0,), (1,))
    deltas = [[[4.0, -1.0]], [[-3.0, 2.0]]]
    sets = [
        {"w": lorax.Lora(np.ones((1, 1), np.float32), np.float32(d), 1.0, axes)}
        for d in deltas
    ]
    for election, want in (("weighted", weighted), ("unweighted", unweighted)):
        adapters, _ = compose.combine(
            sets, weights, "ties", density=1.0, election=election
        )
        make.close(make.delta(adapters["w"]), [want], 1e-6)


elections = pytest.mark.parametrize("election", ["weighted", "unweighted"])


@elections
@pytest.mark.parametrize("maker", [make.lora, make.adalora])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_is_what_the_paper_says(density, maker, election):
    sets = sets_of({}, maker)
    got, error = compose.combine(
        sets, WEIGHTS, "ties", density=density, rank=5, election=election
    )
    want = ties([make.delta(s["w"]) for s in sets], WEIGHTS, density, election)
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


@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
@pytest.mark.parametrize("method,density", [("ties", 0.5), ("dare_ties", 1.0)])
@pytest.mark.parametrize("weights", [[0.7] * 3, [1.0, 0.5, -2.0], [0.0, 3.0, 1.0]])
def test_unweighted_elections_are_pefts_and_weighted_ones_at_equal_weights(
    weights, method, density
):
    torch = pytest.importorskip("torch")
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    sets = sets_of({})
    key = jax.random.key(0) if method == "dare_ties" else None
    own = functools.partial(
        compose.combine, sets, weights, method, density=density, rank=5, key=key
    )
    deltas = [torch.tensor(make.delta(s["w"])) for s in sets]
    given = torch.tensor(weights, dtype=torch.float64)
    want = getattr(merge_utils, method)(deltas, given, density).numpy()
    make.close(make.delta(own(election="unweighted").adapters["w"]), want)
    weighted = make.delta(own().adapters["w"])
    if len(set(weights)) == 1:
        make.close(weighted, want)
    else:
        assert np.linalg.norm(weighted - want) > 0.1 * np.linalg.norm(want)


DARE = functools.partial(compose.combine, density=0.5, key=jax.random.key(3), rank=5)


def survivors(method, shape, election):
    """The result, and what it would be for every subset of sets that kept an entry."""
    sets = sets_of(shape)
    got, error = DARE(sets, WEIGHTS, method, election=election)
    plain = [make.delta(s["w"]) / 0.5 for s in sets]
    deltas = [w * d for w, d in zip(WEIGHTS, plain)]
    subsets = np.array(np.meshgrid(*[[0, 1]] * 3)).reshape(3, -1).T
    of = lambda subset, deltas: [k * d for k, d in zip(subset, deltas)]
    votes = lambda s: None if election == "weighted" else of(s, plain)
    add = lambda s: (
        elected_mean(of(s, deltas), votes(s))
        if method == "dare_ties"
        else sum(of(s, deltas))
    )
    options = np.stack([add(s) for s in subsets])
    assert float(error["w"]) == 0
    return make.delta(got["w"]), options, subsets


@pytest.mark.parametrize("shape", [{}, STACK], ids=["matrix", "stack"])
@pytest.mark.parametrize(
    "method,election",
    [
        ("dare_linear", "weighted"),
        ("dare_ties", "weighted"),
        ("dare_ties", "unweighted"),
    ],
)
def test_dare_keeps_or_drops_each_entry(method, election, shape):
    got, options, subsets = survivors(method, shape, election)
    miss = np.abs(options - got)
    assert miss.min(0).max() < 1e-5 * np.abs(got).max()
    if method == "dare_linear":  # there the subset can be inferred
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


@elections
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_full_leaves_are_thinned_as_dense_changes(method, election):
    base, values = normal(1, 12), [normal(2, 12), normal(3, 12)]
    sets = [{"bias": lorax.Full(v)} for v in values]
    key = None if method == "ties" else jax.random.key(0)
    call = functools.partial(compose.combine, sets, [1.0, 0.5], method, density=0.5)
    got, error = call(key=key, params={"bias": base}, election=election)
    deltas = [np.asarray(v - base, np.float64) for v in values]
    moved = np.asarray(got["bias"].value - base)
    assert float(error["bias"]) == 0
    if method == "ties":
        make.close(moved, ties(deltas, [1.0, 0.5], 0.5, election))
        return
    masks = [(i, j) for i in (0, 2) for j in (0, 2)]
    kept = [[i * deltas[0], j * deltas[1]] for i, j in masks]
    votes = lambda both: None if election == "weighted" else both
    options = [elected_mean([d, 0.5 * e], votes([d, e])) for d, e in kept]
    assert np.abs(np.stack(options) - moved).min(0).max() < 1e-5
    assert np.abs(moved).max() > 0.1
