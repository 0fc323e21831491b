"""AdaLoRA's rank budget: how many triplets are kept at each step, in exact integers.

    t <= t_i:             b0
    t_i < t <= T - t_f:   bT + floor((b0 - bT) (1 - (t - t_i) / (T - t_i - t_f))^3)
    t > T - t_f:          bT

t counts updates from 1. This is the schedule of the released code. Equation 14 of the
paper has t - t_i - t_f in the numerator, which would give 846 triplets at t = t_i where
there are 144 (t_i = 500, t_f = 1500, T = 3000) and jump from 258 to 96 at T - t_f.

References:
  Zhang et al., AdaLoRA, arXiv:2303.10512; github.com/QingruZhang/AdaLoRA.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lorax import _checks


@dataclasses.dataclass(frozen=True)
class BudgetSchedule:
    """The budget over a run. All numbers are structural and never traced.

    Args:
      target_budget: bT, the total rank at the end, over all matrices.
      total_steps: T.
      initial_warmup: t_i, updates before the budget falls.
      final_steps: t_f, updates at the end with a fixed choice of triplets.
      interval: updates between two choices; None for max(10, T // 200).

    Raises:
      ValueError: a number that is not an int or is out of range, or no steps left
        between warm-up and final steps.

    Example:
      >>> schedule = BudgetSchedule(96, 3000, 500, 1500, 10)
      >>> [schedule.budget(144, step) for step in (1, 500, 501, 1000, 1500, 3000)]
      [144, 144, 143, 102, 96, 96]
    """

    target_budget: int
    total_steps: int
    initial_warmup: int
    final_steps: int
    interval: int | None = None  # None until checked

    def __post_init__(self) -> None:
        """Checks every field and fills the interval."""
        if self.interval is None:
            require_int("total_steps", self.total_steps, 1)
            object.__setattr__(self, "interval", max(10, self.total_steps // 200))
        lowest = {"initial_warmup": 0, "final_steps": 0}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require_int(field.name, value, lowest.get(field.name, 1))
        if self.initial_warmup + self.final_steps >= self.total_steps:
            raise ValueError(
                f"initial_warmup={self.initial_warmup} and final_steps="
                f"{self.final_steps} leave none of total_steps={self.total_steps} for "
                "the budget to fall; both are numbers of updates, not positions"
            )

    @property
    def last(self) -> int:
        """The last update at which triplets are chosen, T - t_f."""
        return self.total_steps - self.final_steps

    def budget(self, init_budget: int, step: int) -> int:
        """Returns b(step) exactly; float arithmetic sometimes truncates it by one."""
        if step <= self.initial_warmup:
            return init_budget
        span = self.last - self.initial_warmup
        left = max(self.last - step, 0)
        excess = init_budget - self.target_budget
        return self.target_budget + excess * left**3 // span**3

    def budget_at(self, init_budget: int, step: jax.Array) -> jax.Array:
        """Returns b(step) for a traced step, int32: b0 minus the drops so far."""
        falls = np.asarray(_falls(self, init_budget), np.int32)
        return init_budget - jnp.sum(step >= falls, dtype=jnp.int32)

    def chooses_at(self, step: jax.Array) -> jax.Array:
        """Returns whether triplets are chosen anew at this step.

        This happens at multiples of the interval while the budget falls, and always at
        T - t_f, so that the target is reached.
        """
        interval = cast(int, self.interval)
        falling = (step > self.initial_warmup) & (step < self.last)
        return (falling & (step % interval == 0)) | (step == self.last)


def require_int(name: str, value: Any, lowest: int) -> None:
    """Raises ValueError unless the value is a Python int of at least `lowest`."""
    if not _checks.is_whole(value) or value < lowest:
        raise ValueError(
            f"{name}={value!r}; give a Python int of at least {lowest} (it shapes the "
            "program: under optax.inject_hyperparams name it in static_args)"
        )


@functools.cache
def _falls(schedule: BudgetSchedule, init_budget: int) -> tuple[int, ...]:
    """The steps at which the budget falls, one entry per triplet lost.

    This encodes the whole schedule in b0 - bT numbers, whatever the number of steps.
    """
    steps = range(schedule.initial_warmup, schedule.last + 1)

    def lost(step: int) -> int:
        return init_budget - schedule.budget(init_budget, step)

    count = init_budget - schedule.target_budget
    return tuple(
        steps[bisect.bisect_left(steps, n, key=lost)] for n in range(1, count + 1)
    )
