"""The benchmark's wiring; its numbers come from the command."""

import pytest

from experiments.benchmarks import decode_cost
from tests.data_paths import needs_data

pytestmark = pytest.mark.once


@needs_data
def test_both_ways_write_the_same_and_are_timed(monkeypatch):
    monkeypatch.setattr(decode_cost, "transformers_model", lambda source: None)
    seconds = decode_cost.compare("stories260k", count=5, batch=2, rounds=2)
    assert set(seconds) == {"cached", "uncached, jitted"}
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())


@needs_data
@pytest.mark.slow
def test_adapters_write_the_same_merged_beside_the_base_and_routed():
    seconds = decode_cost.serve("stories260k", count=5, batch=2, rounds=1, adapters=3)
    assert set(seconds) == {"merged", "beside the base", "routed, 3 sets"}
