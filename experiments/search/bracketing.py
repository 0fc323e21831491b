"""A learning rate search that goes on until the best rate is between two others."""

from collections.abc import Callable


def bracket(
    score: Callable[[float], float], start: float, factor: float, limit: int
) -> dict[float, float]:
    """Scores `start` and its neighbours, and goes downhill until the best is inside.

    Args:
      score: scores a learning rate; lower is better, and NaN is worst.
      start: the first learning rate.
      factor: ratio of neighbouring rates.
      limit: maximum number of evaluations.

    Returns:
      Learning rate -> score, in order of learning rate.
    """
    found: dict[int, float] = {}

    def value(power: int) -> float:
        if power not in found:
            result = score(start * factor**power)
            found[power] = result if result == result else float("inf")
        return found[power]

    best = 0
    value(best)
    while len(found) < limit:
        beside = [p for p in (best - 1, best + 1) if p not in found]
        if not beside:
            break
        value(beside[0])
        best = min(found, key=found.__getitem__)
    return {start * factor**power: found[power] for power in sorted(found)}
