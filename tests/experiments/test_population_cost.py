"""A population costs what its members cost separately, by XLA's own counts."""

import pytest

from experiments.benchmarks import population_cost
from experiments.benchmarks.cases import gpt2_shaped

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_adapter_step_costs_no_more_flops_than_a_run_of_its_own(at_once):
    shape = gpt2_shaped.Shape(layers=2, width=64, batch=2)
    # compiled, run, and checked to agree
    row = population_cost.measured(shape, size=2, rounds=1, at_once=at_once)
    assert 0.9 * row["flops_alone"] < row["flops_per_adapter"]
    assert row["flops_per_adapter"] <= 1.02 * row["flops_alone"]
    if at_once == 1:
        assert row["temp_bytes"] <= 1.3 * row["temp_bytes_alone"]
    assert "| 1 for 2 |" in population_cost.table([row], 2)
