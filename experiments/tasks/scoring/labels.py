"""Scores of predicted labels and numbers: what GLUE reports.

All take predictions first. A score of 0/0 (no positive at all, a constant prediction)
is 0, as in scikit-learn: such a prediction explains nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np

Numbers = Sequence[float] | np.ndarray
Score = Callable[[Numbers, Numbers], float]


def accuracy(predictions: Numbers, labels: Numbers) -> float:
    """Returns the share of equal labels."""
    p, y = _aligned(predictions, labels)
    return float(np.mean(p == y))


def f1(predictions: Numbers, labels: Numbers, positive: int = 1) -> float:
    """Returns 2 TP / (2 TP + FP + FN) of one class, as GLUE does for MRPC and QQP."""
    p, y = _aligned(predictions, labels)
    hits = np.sum((p == positive) & (y == positive))
    return _ratio(2.0 * hits, np.sum(p == positive) + np.sum(y == positive))


def macro_f1(predictions: Numbers, labels: Numbers) -> float:
    """Returns the mean F1 of all classes among predictions or labels."""
    p, y = _aligned(predictions, labels)
    return float(np.mean([f1(p, y, c) for c in np.union1d(p, y)]))


def matthews(predictions: Numbers, labels: Numbers) -> float:
    """Returns Matthews' correlation; for more than two classes, Gorodkin's R_K.

    The covariance of the one-hot labels over the geometric mean of their variances,
    which for two classes is (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)).
    """
    p, y = _aligned(predictions, labels)
    classes = np.union1d(p, y)
    p, y = ((v[:, None] == classes).astype(float) for v in (p, y))  # one-hot
    p, y = p - p.mean(0), y - y.mean(0)
    return _ratio(np.sum(p * y), np.sqrt(np.sum(p * p) * np.sum(y * y)))


def pearson(predictions: Numbers, labels: Numbers) -> float:
    """Returns Pearson's correlation."""
    p, y = _aligned(predictions, labels)
    if np.ptp(p) == 0 or np.ptp(y) == 0:  # else their rounding errors correlate
        return 0.0
    p, y = p - p.mean(), y - y.mean()
    return _ratio(p @ y, np.sqrt((p @ p) * (y @ y)))


def spearman(predictions: Numbers, labels: Numbers) -> float:
    """Returns Pearson's correlation of the ranks; ties share their mean rank."""
    p, y = _aligned(predictions, labels)
    return pearson(_ranks(p), _ranks(y))


SCORES: dict[str, Score] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _ratio(numerator: float, denominator: float) -> float:
    """Returns the ratio; 0 for 0/0."""
    return float(numerator / denominator) if denominator else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 1; ties share their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def _aligned(predictions: Numbers, labels: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Returns both as float64 vectors.

    Raises:
      ValueError: they differ in shape, are empty, or hold a NaN or an infinity.
    """
    p, y = (np.asarray(v, np.float64) for v in (predictions, labels))
    if p.shape != y.shape or p.ndim != 1 or not p.size:
        raise ValueError(
            f"predictions have shape {p.shape} and labels {y.shape}: expected two "
            "vectors of one length, one or more. Logits need an argmax first."
        )
    for name, values in (("predictions", p), ("labels", y)):
        if bad := np.flatnonzero(~np.isfinite(values)).tolist():
            raise ValueError(
                f"{name}[{bad[0]}] is {values[bad[0]]}, and {len(bad)} of "
                f"{len(values)} are not finite: a score would be meaningless."
            )
    return p, y
