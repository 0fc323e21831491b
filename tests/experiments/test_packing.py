"""Packed rows: every example once per epoch, with the loss it has alone."""

import jax
import numpy as np
import pytest

from experiments.data import batches, examples, packing
from experiments.tasks import losses
from lorax.models import gpt2, llama

pytestmark = pytest.mark.once


def made(count, seed=0, most=9):
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        n = int(draw.integers(2, most + 2))
        tokens = draw.integers(3, 29, n)
        found.append(examples.make(tokens, [0, *[1] * (n - 1)], "x" * n))
    return found


def loud(params):
    """Kernels large enough for attention and positions to matter."""
    return jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)


def ids_of(batch):
    """The examples of a batch, each as often as it occurs."""
    found = []
    for index, segments in zip(batch["index"], batch["segments"]):
        for segment in range(1, segments.max() + 1):
            (one,) = set(index[segments == segment].tolist())
            found.append(one)
    return found


def test_a_row_by_hand():
    two = [
        examples.make([5, 6, 7], [0, 1, 1], "ab"),
        examples.make([8, 9], [0, 1], "c"),
    ]
    (row,) = [packing.packed_batches(two, 1, 5, 0, seed=0)[0]]
    first = [0, 1] if row["index"][0, 0] == 0 else [1, 0]
    if first == [0, 1]:
        assert row["inputs"].tolist() == [[5, 6, 8, 0, 0]]
        assert row["targets"].tolist() == [[6, 7, 9, 0, 0]]
        assert row["segments"].tolist() == [[1, 1, 2, 0, 0]]
        assert row["positions"].tolist() == [[0, 1, 0, 0, 0]]
    else:
        assert row["inputs"].tolist() == [[8, 5, 6, 0, 0]]
        assert row["targets"].tolist() == [[9, 6, 7, 0, 0]]
        assert row["segments"].tolist() == [[1, 2, 2, 0, 0]]
        assert row["positions"].tolist() == [[0, 0, 1, 0, 0]]
    assert row["weights"].tolist() == [[1, 1, 1, 0, 0]]
    assert row["bytes"].tolist() == [3]


def test_an_epoch_packs_every_example_once_and_little_is_padding():
    given = made(200)
    rows = packing.Rows(np.array([batches.positions(e) for e in given]), 16, seed=3)
    numbers = rows._ends[0]
    for epoch in range(3):
        start = rows._ends[epoch - 1] if epoch else 0
        rows[start]  # makes the plan
        own = [rows[i] for i in range(start, rows._ends[epoch])]
        assert sorted(sum(own, [])) == list(range(200))
    padding = 1 - sum(map(batches.positions, given)) / (16 * numbers)
    assert padding < 0.1
    assert rows[0] != rows[rows._ends[0]]


@pytest.mark.parametrize("counts", [(2, 1, 2), (1, 4, 2)])
def test_no_example_is_lost_or_repeated_when_processes_come_and_go(counts):
    """Batches of 4 rows, read by changing numbers of processes, each its part."""
    given = made(60)
    together, whole = [], packing.packed_batches(given, 4, 16, 0, seed=1)
    for step in range(12):
        count = counts[step // 4]
        rows = 4 // count
        for process in range(count):
            part = slice(process * rows, (process + 1) * rows)
            own = packing.packed_batches(given, 4, 16, 0, 1, part)[step]
            assert len(own["inputs"]) == rows
            together += ids_of(own)
        assert together[-len(ids_of(whole[step])) :] == ids_of(whole[step])
    once = together[:60]  # the first epoch ends within a batch
    assert sorted(once) == list(range(60))


@pytest.mark.parametrize("family", [gpt2, llama])
def test_packing_changes_no_loss(family):
    fields = (
        dict(vocabulary=29, positions=32, width=16, layers=2, heads=2, hidden=24)
        if family is gpt2
        else dict(vocabulary=29, positions=32, width=16, layers=2, heads=2, kv_heads=1)
        | dict(head_dim=8, hidden=24)
    )
    model = family.Model(family.Config(**fields))
    given = made(20)
    params = model.init(jax.random.key(0), np.zeros((1, 4), int))["params"]
    params = loud(params)
    loss_fn = jax.jit(losses.make_causal(model))
    total = lambda batch: jax.device_get(loss_fn(params, batch)[1])
    data = packing.packed_batches(given, 2, 16, 0, seed=0)
    packed = [total(data[i]) for i in range(3)]
    seen = sum((ids_of(data[i]) for i in range(3)), [])
    alone = [total(batches.evaluation_batches([given[i]], 1, [16], 0)[0]) for i in seen]
    for name in ("nats", "weight", "bytes"):
        ours, theirs = (sum(float(x[name]) for x in part) for part in (packed, alone))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_without_segments_documents_would_see_each_other():
    """The mask and the positions matter: without them the loss changes."""
    model = gpt2.Model(gpt2.Config(29, 32, 16, 2, 2, 24))
    params = loud(model.init(jax.random.key(0), np.zeros((1, 4), int))["params"])
    batch = packing.packed_batches(made(20), 2, 16, 0, seed=0)[0]
    loss = lambda batch: float(losses.make_causal(model)(params, batch)[0])
    for name in ("segments", "positions"):
        rest = {k: v for k, v in batch.items() if k != name}
        assert abs(loss(rest) - loss(batch)) > 1e-3


def test_an_example_too_long_and_none_at_all():
    with pytest.raises(ValueError, match=r"examples\[\d+\] takes \d+"):
        packing.packed_batches(made(9), 2, 3, 0, seed=0)
    with pytest.raises(ValueError, match="0 examples"):
        packing.packed_batches([], 2, 3, 0, seed=0)
