"""Batches: rows by hand, every example once, stable shapes."""

import itertools

import numpy as np
import pytest

from experiments.data import batches, examples
from experiments.trainer import loop


def example(*tokens, prompt=1):
    mask = [0] * prompt + [1] * (len(tokens) - prompt)
    return examples.make(tokens, mask, "x" * len(tokens))


def of_length(n, first=0):
    return example(*range(first, first + n))


def test_a_row_by_hand():
    row = batches.next_token(example(5, 6, 7, 8, prompt=2), 5, pad_id=9)
    assert row["inputs"].tolist() == [5, 6, 7, 9, 9]
    assert row["targets"].tolist() == [6, 7, 8, 9, 9]
    assert row["weights"].tolist() == [0, 1, 1, 0, 0]
    assert row["bytes"] == 4


def test_padding_with_eos_leaves_the_true_eos_in_the_loss():
    eos = 2
    row = batches.next_token(example(1, 7, eos), 4, pad_id=eos)
    assert row["targets"].tolist() == [7, eos, eos, eos]
    assert row["weights"].tolist() == [1, 1, 0, 0]


def test_evaluation_counts_every_example_once():
    given = [of_length(n, first=10 * n) for n in (3, 9, 2, 5, 4, 7, 3)]
    made = batches.evaluation_batches(given, 2, [8, 4], pad_id=0)
    # up to 4 positions: lengths 3 2 5 4 3, so three batches; up to 8: 9 7
    assert [b["inputs"].shape for b in made] == [(2, 4)] * 3 + [(2, 8)]
    assert all(b["weights"].dtype == np.float32 for b in made)
    index = np.concatenate([b["index"] for b in made])
    assert sorted(index.tolist()) == [-1, 0, 1, 2, 3, 4, 5, 6]
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in made])
    true = np.concatenate([e["tokens"][1:] for e in given])
    assert sorted(targets.tolist()) == sorted(true.tolist())
    assert sum(b["bytes"].sum() for b in made) == 3 + 9 + 2 + 5 + 4 + 7 + 3


def test_labelled_rows_and_their_filler():
    given = [
        {"tokens": np.arange(n, dtype=np.int32), "label": np.asarray(y, np.int32)}
        for n, y in ((4, 2), (3, 1), (2, 0))
    ]
    first, last = batches.evaluation_batches(
        given, 2, [4], pad_id=7, collate=batches.labelled
    )
    assert first["tokens"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 7]]
    assert first["real"].tolist() == [[True] * 4, [True] * 3 + [False]]
    assert (first["labels"].tolist(), first["weights"].tolist()) == ([2, 1], [1, 1])
    assert (last["index"].tolist(), last["weights"].tolist()) == ([2, -1], [1, 0])


def test_training_is_a_function_of_seed_and_step():
    given = [of_length(2 + n % 7) for n in range(40)]
    make = lambda seed: batches.training_batches(given, 4, [4, 8], 0, seed)
    first, again, other = make(0), make(0), make(1)
    same = lambda x, y, i: np.array_equal(x[i]["index"], y[i]["index"])
    assert all(same(first, again, i) for i in (0, 3, 100))
    assert not all(same(first, other, i) for i in range(4))


def test_an_epoch_visits_every_example_and_the_next_in_another_order():
    given = [of_length(2 + n % 7) for n in range(42)]  # 24 short, 18 long
    data = batches.training_batches(given, 3, [4, 8], 0, seed=0)
    epochs = [[data[i] for i in range(14 * e, 14 * e + 14)] for e in (0, 1)]
    seen = [np.concatenate([b["index"] for b in epoch]) for epoch in epochs]
    assert all(sorted(s.tolist()) == list(range(42)) for s in seen)
    assert (seen[0] != seen[1]).any()
    assert {b["inputs"].shape for b in epochs[0]} == {(3, 4), (3, 8)}
    lengths = [b["inputs"].shape[1] for b in epochs[0]]
    assert len(list(itertools.groupby(lengths))) > 4  # buckets take turns


def test_a_bucket_smaller_than_a_batch_repeats_in_training():
    data = batches.training_batches([of_length(3), of_length(4)], 5, [4, 16], 0, 0)
    assert data[0]["inputs"].shape == (5, 4)  # no batch from the empty bucket
    assert set(data[0]["index"].tolist()) == {0, 1}


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"examples\[1\] takes 8 positions, .* have 7"):
        batches.evaluation_batches([of_length(3), of_length(9)], 2, [7, 4], 0)
    with pytest.raises(ValueError, match=r"0 examples and lengths \[4\]"):
        batches.training_batches([], 2, [4], 0, 0)


@pytest.mark.parametrize("count", (2, 3))
def test_processes_make_a_batch_together(count):
    given = [of_length(2 + n % 7, first=10 * n) for n in range(40)]
    training = lambda part: batches.training_batches(
        given, 6, [4, 8], 0, seed=0, part=part
    )
    held_out = lambda part: batches.evaluation_batches(given, 6, [4, 8], 0, part=part)
    rows = 6 // count
    parts = [slice(rows * i, rows * (i + 1)) for i in range(count)]
    for make in (lambda part: [training(part)[i] for i in range(9)], held_out):
        whole, own = make(slice(None)), [make(part) for part in parts]
        assert {len(part) for part in own} == {len(whole)}
        for i, batch in enumerate(whole):
            for key, value in batch.items():
                joined = np.concatenate([part[i][key] for part in own])
                np.testing.assert_array_equal(joined, value)


def test_batches_made_ahead_are_those_of_their_steps():
    given = [of_length(2 + n % 7) for n in range(40)]
    data = batches.training_batches(given, 4, [4, 8], 0, seed=0)
    made = [*loop.ahead(data, 3, 19)]
    assert len(made) == 16
    for step, batch in enumerate(made, 3):
        assert batch.keys() == data[step].keys()
        for key, value in batch.items():
            np.testing.assert_array_equal(value, data[step][key])
