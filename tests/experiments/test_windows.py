"""Windows of bytes, checked by hand on texts of a few bytes."""

import numpy as np
import pytest

from experiments.data import windows
from experiments.data.sources.documents import Document

DOCS = (Document("a", b"abcde"), Document("b", b"fgh"))  # stream: 0 abcde 0 fgh


def test_stream_opens_every_document_with_a_separator():
    assert windows.stream(DOCS).tobytes() == b"\0abcde\0fgh"


def test_evaluation_scores_every_byte_once():
    batches = windows.evaluation_batches(DOCS, batch_size=2, length=4)
    inputs, targets, weights = (
        np.concatenate([b[name] for b in batches])
        for name in ("inputs", "targets", "weights")
    )
    assert inputs.shape == (4, 4)  # three windows, and one to fill the second batch
    assert bytes(targets[weights > 0].tolist()) == b"abcde\0fgh"
    assert bytes(inputs[weights > 0].tolist()) == b"\0abcde\0fg"


def test_limited_evaluation_spreads_over_the_text():
    docs = [Document("long", bytes(range(1, 101)))]
    (batch,) = windows.evaluation_batches(docs, batch_size=4, length=5, limit=20)
    assert batch["weights"].sum() == 20
    assert batch["targets"].min() < 10 and batch["targets"].max() > 90


def test_training_windows_are_a_function_of_seed_and_step():
    docs = [Document("long", bytes(range(1, 201)))]
    make = lambda seed: windows.training_batches(
        docs, batch_size=2, length=8, seed=seed
    )
    first, again, other = make(0), make(0), make(1)
    for step in (0, 50):  # 50 is in a later epoch
        batch = first[step]
        np.testing.assert_array_equal(batch["inputs"], again[step]["inputs"])
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        np.testing.assert_array_equal(batch["targets"] - batch["inputs"], 1)
        assert (batch["inputs"] != other[step]["inputs"]).any()


def test_an_epoch_visits_all_of_the_text():
    docs = [Document("long", bytes(range(1, 201)))]
    batches = windows.training_batches(docs, batch_size=1, length=10, seed=0)
    seen = np.concatenate([batches[i]["inputs"].ravel() for i in range(19)])
    assert len(np.unique(seen // 20)) == 10


def test_too_little_text_is_named():
    with pytest.raises(ValueError, match="too few for windows of 128"):
        windows.training_batches(DOCS, batch_size=2, length=128, seed=0)
