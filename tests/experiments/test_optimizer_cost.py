"""State sizes of the optimisers, counted; times come from the benchmark."""

import pytest

from experiments.benchmarks import optimizer_cost
from experiments.benchmarks.cases import gpt2_shaped

pytestmark = pytest.mark.slow


def test_state_bytes_are_what_each_optimiser_promises():
    shape = gpt2_shaped.Shape(layers=1, width=32, heads=2, rank=4)
    rows = optimizer_cost.compare(shape, rounds=1)
    ratio = {name: row["state_ratio"] for name, row in rows.items()}
    for name in ("lora_plus", "lora_pro factor", "adam + spectral delta"):
        assert ratio[name] <= 1.001
    kernels = len(gpt2_shaped.LINEARS)
    triplets = kernels * shape.rank
    adamw = rows["adamw on AdaLora"]["state"]
    assert rows["adalora"]["state"] <= 2 * adamw + triplets + 64 + 8 * 1000
    widths = 4 * (8 * 32 + 2 * 32 + 2 * 128)  # n + m floats per kernel
    assert rows["lora_pro rowcol"]["state"] <= widths + 64
    assert "share of a train step" in optimizer_cost.table(rows, 100.0)


def test_the_table_of_programs_has_both_kinds_of_shapes():
    rows = optimizer_cost.compare_programs(3, 1, ("adamw", "riemannian"))
    row = rows["riemannian"]
    assert row["equal_lines"] < row["unequal_lines"]
    text = optimizer_cost.programs_table(rows)
    assert f"| riemannian | {row['equal_lines']} |" in text
