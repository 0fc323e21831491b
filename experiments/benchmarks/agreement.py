"""Whether train steps of several frameworks compute the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from experiments.benchmarks import measure
from experiments.benchmarks.trainers import BETA1, Trainer


def require(
    trainers: Mapping[str, Trainer],
    alike: Mapping[str, bool],
    tolerance: float = 1e-5,
    steps: int = 3,
) -> float:
    """Raises unless all trainers compute the same; it runs their first steps.

    The losses and gradients of the first step are held to `tolerance` of the largest
    entry of an array, and the losses of the next ones, which tell whether the updates
    agree, to ten times that. The gradient of the keys' bias is rounding alone, for a
    softmax does not see it, and is held to the queries'.

    Args:
      trainers: by name, none of which has made a step.
      alike: those whose gradients are not to be held to the first trainer's, False.
      tolerance: relative.
      steps: to run.

    Returns:
      The largest deviation of a gradient, relative to its largest entry.
    """
    first = next(iter(trainers))
    losses = {name: [trainer.step()] for name, trainer in trainers.items()}
    expected = {k: v / (1 - BETA1) for k, v in trainers[first].moments().items()}
    deviation = 0.0
    for name, trainer in trainers.items():
        measure.agree(losses[name][0], losses[first][0], tolerance)
        if not alike.get(name, True):
            continue
        found = trainer.moments()
        if set(found) != set(expected):
            raise AssertionError(f"{name} trains {sorted(found)}")
        for (path, field), value in expected.items():
            beside = path.replace("/k/bias", "/q/bias"), field
            off = found[path, field].reshape(value.shape) / (1 - BETA1) - value
            off = np.abs(off).max() / np.abs(expected[beside]).max()
            if not off <= tolerance:  # NaN as well
                raise AssertionError(f"{name}: the gradient of {path} is {off:.1e} off")
            deviation = max(deviation, float(off))
        for _ in range(steps - 1):
            losses[name].append(trainer.step())
    for name in trainers:
        for own, other in zip(losses[name], losses[first], strict=False):
            measure.agree(own, other, 10 * tolerance)
    return deviation
