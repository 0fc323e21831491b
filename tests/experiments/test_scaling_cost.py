"""Adapters cost what arithmetic predicts, by XLA's own counts."""

import jax
import pytest

from experiments.benchmarks import scaling_cost
from experiments.benchmarks.cases import gpt2_shaped as gpt2

pytestmark = pytest.mark.slow

BASE = gpt2.Shape(layers=1, width=32, heads=4, vocabulary=32, batch=2, time=8, rank=2)
SWEEPS = {"rank": (2, 4), "adapters": (2,)}


@pytest.fixture(scope="module")
def rows():
    compile_ = jax.stages.Lowered.compile
    fast = lambda self: compile_(self, {"xla_backend_optimization_level": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", fast)
        return scaling_cost.compare(SWEEPS, BASE, builds=1)


def test_arguments_grow_by_the_adapters_and_their_moments(rows):
    by = {(row["sweep"], row["value"]): row for row in rows}
    width, hidden = BASE.width, BASE.hidden
    a_rank = 4 * (2 * width) + 2 * (width + hidden)  # floats of one layer
    three = 4 * 3 * a_rank  # bytes, with AdamW's two moments
    extra = lambda row: (
        row["adapted"]["argument_bytes"] - row["without"]["argument_bytes"]
    )
    # without adapters three biases are trained, with their moments
    assert extra(by["rank", 4]) - extra(by["rank", 2]) == three * 2
    index = 4 * BASE.batch
    assert extra(by["adapters", 2]) - extra(by["rank", 2]) == three * 2 + index


def test_adapters_cost_flops_and_one_program(rows):
    for row in rows:
        assert row["adapted"]["flops"] > row["without"]["flops"]
        assert row["adapted"]["programs"] == 1


def test_table_and_figure(rows, tmp_path):
    lines = [line.split(" | ") for line in scaling_cost.table(rows).splitlines()]
    assert {len(line) for line in lines} == {10}
    assert [line[0] for line in lines[2:]] == [
        *("| rank 2", "| rank 4", "| adapters 2")
    ]
    scaling_cost.draw(rows, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 5000
