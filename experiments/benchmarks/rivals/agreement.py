"""Checks that train steps of several frameworks compute the same.

Two float32 programs differ by their orders of summation, which depend on the processor.
The reference is therefore the same step in float64: every program's error against it is
measured, and none may be far above the smallest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments.benchmarks.cases import measure
from experiments.benchmarks.rivals.trainers import BETA1, Named, Reference, Trainer


class Errors(NamedTuple):
    """How far programs are from float64.

    Attributes:
      gradients: by program, the largest error of a gradient relative to the largest
        entry of its array.
      limit: the largest error allowed.
    """

    gradients: dict[str, float]
    limit: float


def require(
    trainers: Mapping[str, Trainer],
    alike: Mapping[str, bool],
    reference: Reference,
    dtype: str = "float32",
    steps: int = 3,
) -> Errors:
    """Runs the first steps of all trainers, and raises unless they compute the same.

    The limit for gradients and losses of the first step is `measure.limit`; for losses
    of the next steps, which show whether the updates agree, it is ten times that.

    Args:
      trainers: by name; none of them has made a step yet.
      alike: False for those whose gradients are not to be compared.
      reference: loss and gradients of the first step in float64.
      dtype: in which the programs compute.
      steps: number of steps to run.

    Raises:
      AssertionError: a program trains other arrays, or is too far off.
    """
    losses = {name: [trainer.step()] for name, trainer in trainers.items()}
    errors = {
        name: _error(name, trainer.moments(), reference.gradients)
        for name, trainer in trainers.items()
        if alike.get(name, True)
    }
    limit = measure.limit((error for error, _ in errors.values()), dtype)
    for name, (error, path) in errors.items():
        if not error <= limit:  # NaN as well
            raise AssertionError(
                f"{name}: the gradient of {path} is {error:.1e} off float64; the best "
                f"program's error allows {limit:.1e}"
            )
    first = next(iter(trainers))
    for name, trainer in trainers.items():
        measure.agree(losses[name][0], reference.loss, limit)
        if alike.get(name, True):
            losses[name] += [trainer.step() for _ in range(steps - 1)]
    for name in trainers:
        for own, other in zip(losses[name], losses[first], strict=False):
            measure.agree(own, other, 10 * limit)
    return Errors({name: error for name, (error, _) in errors.items()}, limit)


def _error(name: str, moments: Named, expected: Named) -> tuple[float, str]:
    """Returns the largest relative error of a gradient, and its path.

    The gradient of the keys' bias is only rounding, because a softmax does not depend
    on it; its error is relative to the queries' instead.
    """
    if set(moments) != set(expected):
        raise AssertionError(f"{name} trains {sorted(moments)}")
    worst = 0.0, ""
    for (path, field), value in expected.items():
        beside = path.replace("/k/bias", "/q/bias"), field
        off = moments[path, field].reshape(value.shape) / (1 - BETA1) - value
        error = float(np.abs(off).max() / np.abs(expected[beside]).max())
        if not error <= worst[0]:
            worst = error, path
    return worst
