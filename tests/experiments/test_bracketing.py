"""The sweep: the optimum ends up inside the grid, or the budget is spent."""

import math

import pytest

from experiments.search.bracketing import bracket


def bowl(best):
    return lambda rate: (math.log2(rate) - best) ** 2


@pytest.mark.parametrize("best", [-3.2, 0.0, 2.9])
def test_the_best_is_bracketed_whatever_the_start(best):
    found = bracket(bowl(best), start=1.0, factor=2.0, limit=20)
    rates = sorted(found)
    winner = rates.index(min(found, key=found.get))
    assert rates[winner] == 2.0 ** round(best)
    assert 0 < winner < len(rates) - 1


def test_divergence_counts_as_worst():
    score = lambda rate: math.nan if rate > 1 else -rate
    found = bracket(score, start=1.0, factor=2.0, limit=20)
    assert min(found, key=found.get) == 1.0 and found[2.0] == math.inf


def test_the_budget_is_kept():
    assert len(bracket(bowl(50), start=1.0, factor=2.0, limit=4)) == 4
