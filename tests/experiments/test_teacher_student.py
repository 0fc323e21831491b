"""The study's wiring at toy size; its numbers come from the command."""

import numpy as np
import pytest

from experiments.studies import teacher_student as study
from experiments.studies.method import comparison

pytestmark = pytest.mark.slow


def test_a_sweep_learns_and_its_table_says_what_is_shown(tmp_path):
    problem = study.Problem((12, 8), (2,), 0.1)
    lora = study.Method(study._lora(2), study.METHODS["LoRA"].make_tx, 3e-2)
    plus = study.Method(study._lora(2), study.METHODS["LoRA+"].make_tx, 1e-2)
    results = {
        name: study.sweep(problem, method, steps=60, seeds=2, count=3)
        for name, method in (("LoRA", lora), ("LoRA+", plus))
    }
    for result in results.values():
        curves = np.array(result["curves"])
        assert curves.shape == (2, 60) and curves[:, -1].mean() < 0.5
        assert min(result["grid"].values()) == result["grid"][f"{result['rate']:.3g}"]
    rows = comparison.summary(results)
    assert [row[0] for row in rows] == ["LoRA", "LoRA+"] and rows[0][4] == "60"
    comparison.draw({"toy": results}, tmp_path / "curves.png", study.AXES)
    assert (tmp_path / "curves.png").stat().st_size > 5_000
