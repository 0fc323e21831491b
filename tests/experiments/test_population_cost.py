"""A population costs what its members cost apart, by XLA's own counts."""

from experiments.benchmarks import gpt2_shaped, population_cost


def test_an_adapter_step_costs_no_more_flops_than_a_run_of_its_own():
    shape = gpt2_shaped.Shape(layers=2, width=64, batch=2)
    # compiled, run, and found to agree to 1e-5
    row = population_cost.measured(shape, size=3, rounds=1)
    assert row["flops_per_adapter"] <= 1.02 * row["flops_alone"]
    assert len(row["compile_s_alone"]) == 3
    assert population_cost.table({2: row}, 3).count("| 1 for 3 |") == 1
