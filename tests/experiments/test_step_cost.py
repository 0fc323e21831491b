"""The benchmark's wiring; its numbers come from the command."""

import pytest

from experiments.benchmarks.quantized import step_cost
from tests.data_paths import needs_data

pytestmark = [pytest.mark.once, needs_data]


def test_every_format_is_measured(monkeypatch):
    forms = ("", "int8", "int4")
    monkeypatch.setattr(step_cost, "FORMS", forms)
    monkeypatch.setattr(
        step_cost.quantizing,
        "rules",
        lambda text: [(r"layers/(gate|up|o)/kernel", text)] if text else [],
    )
    figures = step_cost.compare("stories260k", rows=2, length=8, rounds=2)
    assert list(figures) == ["float32", *forms[1:]]
    assert figures["float32"]["step"] == figures["float32"]["base_bytes"] == 1
    sizes = [row["base_bytes"] for row in figures.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.8
    assert all(row["decode"] > 0 for row in list(figures.values())[1:])
    assert len(step_cost.table(figures).splitlines()) == 2 + len(forms)
