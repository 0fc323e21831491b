"""Scores of labels: worked out by hand."""

import math

import numpy as np
import pytest

from experiments.tasks.scoring import labels

TRUE = [1, 1, 1, 0, 0, 0, 0, 0]
GUESS = [1, 1, 0, 1, 0, 0, 0, 0]  # TP 2, FN 1, FP 1, TN 4


def test_two_classes_by_hand():
    assert labels.accuracy(GUESS, TRUE) == 6 / 8
    assert labels.f1(GUESS, TRUE) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # (2*4 - 1*1) / sqrt(3 * 3 * 5 * 5)
    assert labels.matthews(GUESS, TRUE) == pytest.approx(7 / 15)
    # F1 of class 0: 2*4 / (8 + 1 + 1)
    assert labels.macro_f1(GUESS, TRUE) == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_three_classes_by_hand():
    true, guess = [0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2]
    # F1: 1; 2/3 (TP 1, FN 1); 4/5 (TP 2, FP 1)
    assert labels.macro_f1(guess, true) == pytest.approx((1 + 2 / 3 + 4 / 5) / 3)
    # R_K = (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)) with s = 6
    # samples, c = 5 right, predicted p = 2, 1, 3 and true t = 2, 2, 2:
    #   (30 - 12) / sqrt((36 - 14)(36 - 12))
    assert labels.matthews(guess, true) == pytest.approx(18 / math.sqrt(22 * 24))


def test_correlations_by_hand():
    # deviations of (1, 2, 6) from 3: -2, -1, 3; of (1, 2, 3): -1, 0, 1
    assert labels.pearson([1, 2, 6], [1, 2, 3]) == pytest.approx(5 / math.sqrt(14 * 2))
    assert labels.spearman([1, 2, 6], [1, 2, 3]) == pytest.approx(1)
    assert labels.spearman([9, 8, 1], [1, 2, 3]) == pytest.approx(-1)
    # ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4: deviations -1 -1 .5 1.5 and
    # -1.5 -.5 .5 1.5
    assert labels.spearman([5, 5, 6, 7], [1, 2, 3, 4]) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )


@pytest.mark.parametrize("name", sorted(labels.SCORES))
def test_perfect_is_one_and_a_constant_explains_nothing(name):
    score = labels.SCORES[name]
    assert score(TRUE, TRUE) == pytest.approx(1)
    constant = score([0] * 8, TRUE)
    assert constant == {"accuracy": 5 / 8, "macro_f1": 5 / 13}.get(name, 0.0)
    assert labels.pearson([0.1] * 3, [1, 2, 3]) == 0.0


@pytest.mark.parametrize("name", sorted(labels.SCORES))
def test_what_is_not_finite_is_refused(name):
    score = labels.SCORES[name]
    with pytest.raises(
        ValueError, match=r"predictions\[1\] is nan, and 2 of 3 are not"
    ):
        score([1, math.nan, math.inf], [1, 0, 1])
    with pytest.raises(ValueError, match=r"labels\[2\] is inf"):
        score([1, 0, 1], [1, 0, math.inf])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shape \(2, 2\) and labels \(2,\).*argmax"):
        labels.accuracy(np.ones((2, 2)), np.ones(2))
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        labels.accuracy([], [])
