"""Gradient FLOPs, relative to LoRA with as many parameters or more: our bounds."""

import pytest

pytest.importorskip("absl")
from experiments.benchmarks import method_cost

WIDTH, TOKENS = 1024, 512
BOUNDS = {  # nothing runs: the programs are compiled and their FLOPs counted
    "VeRA": 1.1,
    "LoRA-XS": 1.1,
    "OFT": 1.3,
    "IA3": 1.1,
    "IA3, feedforward": 1.1,
    "LoKr": 1.1,
    "LoRA-XS, rank 32": 1.1,
}


@pytest.fixture(scope="module")
def baseline():
    return method_cost.cost(method_cost.METHODS["LoRA"], WIDTH, TOKENS)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_gradient_costs_about_what_loras_does(name, baseline):
    own = method_cost.cost(method_cost.METHODS[name], WIDTH, TOKENS)
    assert own.parameters <= baseline.parameters
    assert own.flops <= BOUNDS[name] * baseline.flops


def test_the_table_has_a_line_of_every_method():
    lines = method_cost.table(["LoRA", "IA3"], 64, 16)
    assert lines[2].startswith("| LoRA | 8,192 | 1.000 | 1.00 |")
    assert len(lines) == 4 and lines[3].startswith("| IA3 | 512 |")
