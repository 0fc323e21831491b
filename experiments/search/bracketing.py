"""A search for a learning rate that goes on until the best lies between two others."""

from collections.abc import Callable


def bracket(
    score: Callable[[float], float], start: float, factor: float, limit: int
) -> dict[float, float]:
    """Scores `start`, its neighbours, and on downhill until the best is inside.

    Args:
      score: of a learning rate, lower is better; NaN counts as worst.
      start: the first learning rate.
      factor: ratio of neighbours.
      limit: most evaluations to spend.

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
