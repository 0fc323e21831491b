"""The host waits for the device only to report, and reads little per step."""

import grain
import jax
import numpy as np
import optax
import pytest
import rich.console

import lorax
from experiments.machine import placement
from experiments.tasks import classify, respond
from experiments.trainer import fit, metrics, nonfinite, prepare, progress
from lorax.models import gpt2

STEPS, EVERY = 8, 4


class Scalar:
    """A step's result that records when it is read."""

    def __init__(self, value, name, reads):
        self.value, self.name, self.reads = value, name, reads

    def __array__(self, dtype=None, copy=None):
        self.reads.append(self.name)
        return np.asarray(self.value, dtype)


def test_a_step_reads_one_number_and_a_report_all_at_once(tmp_path, monkeypatch):
    reads, calls, told = [], [], []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: calls.append(x) or device_get(x))
    rows = grain.MapDataset.source([np.ones((4, 3), np.float32)] * STEPS)
    loss_fn = lambda params, x: (((x @ params["w"] - 1) ** 2).mean(), {})
    problem = prepare.Problem(
        loss_fn, {"w": np.eye(3, 2)}, [lorax.Target("w", rank=1)], optax.sgd(0.1), rows
    )
    prepared = prepare.prepare(jax.random.key(0), problem)

    def step(state, params, batch, clock):
        told.append((len(reads), len(calls)))
        state, made = prepared.step(state, params, batch, clock)
        return state, {name: Scalar(v, name, reads) for name, v in made.items()}

    with progress.bars(rich.console.Console(quiet=True)) as bars:
        fit.fit(
            prepared._replace(step=step),
            rows,
            fit.Schedule(STEPS, log_every=EVERY),
            fit.Output("lora", bars),
            guard=nonfinite.Guard(tmp_path, 1),
        )
    moments = [*told, (len(reads), len(calls))]
    between = [
        (reads[a[0] : b[0]], b[1] - a[1])
        for a, b in zip(moments, moments[1:], strict=False)
    ]
    # the guard is one step behind, and checks once more after the last
    assert between[0] == ([], 0)
    for number, (names, fetches) in enumerate(between[1:-1], 2):
        report = number % EVERY == 0
        assert names[:1] == ["skipped"] and fetches == 1 + report, (number, names)
        assert len(names) == 1 + report * (EVERY + 3), (number, names)
    assert between[-1][0][:2] == ["skipped", "skipped"] and between[-1][1] == 3


def of_responses(batches):
    model = lambda params, batch: (0.0, {"nats": params, "bytes": batch["x"].size})
    return respond.make_bits_per_byte(model)(1.0, batches)


def of_bytes(batches):
    model = lambda params, batch: (params, {"weight": batch["x"].sum()})
    return metrics.make_bits_per_byte(model)(1.0, batches)


def of_labels(batches):
    model = gpt2.Model(gpt2.Config())  # not asked: predict is ours
    scored = classify.make_scores(model, ["accuracy"], placement.ALONE)
    return scored(1.0, batches)["valid_accuracy"]


@pytest.mark.parametrize("score", [of_responses, of_bytes, of_labels])
def test_an_evaluation_dispatches_all_before_it_reads(score, monkeypatch):
    happened = []

    def noted(name, function):
        return lambda x: happened.append(name) or function(x)

    predict = lambda params, batch: batch["labels"]
    monkeypatch.setattr(classify, "make_predict", lambda model: predict)
    monkeypatch.setattr(jax, "device_get", noted("read", jax.device_get))
    monkeypatch.setattr(classify.sharding, "fetch", noted("read", np.asarray))

    class Batches(list):
        def __iter__(self):
            for batch in super().__iter__():
                happened.append("batch")
                yield batch

    one = {"x": np.ones(2), "labels": np.array([1, 2]), "index": np.array([0, -1])}
    assert score(Batches([one] * 3)) > 0
    assert happened[:4] == ["batch"] * 3 + ["read"] and "batch" not in happened[4:]


def test_rows_that_fill_a_batch_up_are_not_scored():
    batch = {"labels": np.array([1, 2, 2]), "index": np.array([0, 1, -1])}
    found = classify._collected(
        lambda params, b: b["labels"] * 0 + 1, None, [batch] * 2
    )
    np.testing.assert_array_equal(found, [[1, 1, 1, 1], [1, 2, 1, 2]])
