"""The study of batch sizes: losses with known best rates, and the laws' claims."""

import math
import types

import numpy as np
import pytest

from experiments.studies.claims import batch_rates, laws, steps
from experiments.studies.method import comparison, scorecard

pytestmark = pytest.mark.once


def test_the_laws_by_hand():
    assert laws.octaves("sqrt", 4, 64, 100.0) == pytest.approx(2)
    # sqrt(B) / (1 + B / N): 16 times the batch, (1 + 4/12) / (1 + 64/12) = 4 / 19
    surge = laws.octaves("surge", 4, 64, 12.0)
    assert surge == pytest.approx(math.log2(4 * 4 / 19))
    found = np.array([1.9, 2.0, 2.1])
    claim = laws.claim("sqrt", 2.0, found, "from batch 4 to 64", "here")
    assert claim.number == "octaves from batch 4 to 64, minus the law's +2.00; here"
    assert scorecard.verdict(claim) == "shown"  # 0 +- 0.25
    assert scorecard.verdict(claim._replace(values=found - 3)) == "contradicted"


def test_best_rates_lie_where_the_losses_are_lowest(tmp_path, monkeypatch):
    """The best rate is 1e-3 times sqrt(batch / 16) and a factor of its seed."""

    def maker(size):
        def loss(seed, rate):
            best = 1e-3 * math.sqrt(size / 16) * 2 ** (0.1 * seed)
            return 1.0 + math.log(rate / best) ** 2

        return loss

    monkeypatch.setattr(batch_rates, "maker", maker)
    monkeypatch.setattr(batch_rates, "setting_of", lambda size: (None, None))
    reached = types.SimpleNamespace(noise_scale=40.0)
    monkeypatch.setattr(steps, "reach", lambda setting, count: reached)
    path = tmp_path / "runs.jsonl"
    found = batch_rates.study(comparison.Runs(path, batch_rates.digests()))
    for size in batch_rates.SIZES:
        best = [1e-3 * math.sqrt(size / 16) * 2 ** (0.1 * s) for s in (1, 2, 3)]
        np.testing.assert_allclose(found["rates"][str(size)], best, rtol=1e-6)
    late = comparison.Runs(path, batch_rates.digests(), minutes=-1)
    assert batch_rates.study(late)["noise_scale"] == 40
    told = {**found, "cpu_seconds": 3}
    # from 4 to 64: sqrt +2, surge 1 + 4/40 over 1 + 64/40 is 1.24 below
    assert "| +2.00 +- 0.00 | +2.00 | +0.76 |" in batch_rates.page(told)
    sqrt, surge, _, *after = batch_rates.claims(told)
    assert scorecard.verdict(sqrt) == "shown" and len(after) == 3
    np.testing.assert_allclose(sqrt.values, 0, atol=1e-6)
    np.testing.assert_allclose(surge.values, math.log2((1 + 16 / 40) / 1.1), rtol=1e-4)
