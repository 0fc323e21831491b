"""Which form of LoRA-Pro, and how much damping, under Adam's kind of steps?

    python -m experiments.studies.lora_pro_modes --seeds=8

The student and the protocol of `teacher_student`: a kernel 48 x 32, a teacher of rank
4, two lengths and two levels of noise on the targets, every arm with its own learning
rate.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import optax
from absl import app

import lorax
from experiments.studies import teacher_student
from experiments.studies.method import comparison
from experiments.studies.teacher_student import Method, Problem
from lorax import optim

STEPS = (100, 300)
NOISE = (1.0, 4.0)
RATES = 9
TARGET = lorax.Target(".*", rank=4, alpha=4)


def _arm(mode: Any, damping: float) -> Method:
    def make(rate: Any, _: Any) -> Any:
        return optim.lora_pro(rate, mode, damping=damping)

    return Method(TARGET, make, 8e-3)


ARMS = {
    "LoRA": Method(TARGET, lambda rate, _: optax.adam(rate), 8e-3),
    **{f"{m}, {d:g}": _arm(m, d) for m in ("factor", "rowcol") for d in (0.1, 0.01)},
}


def main(argv: Sequence[str]) -> None:
    """Prints one table for each length and level of noise."""
    del argv
    for steps, noise in itertools.product(STEPS, NOISE):
        problem = Problem((48, 32), (4,), noise)
        seeds = comparison.SEEDS.value
        results = {
            name: teacher_student.sweep(problem, method, steps, seeds, RATES)
            for name, method in ARMS.items()
        }
        told = comparison.table(results)
        print(f"\n{steps} steps, noise {noise:g}\n\n{told}", flush=True)


if __name__ == "__main__":
    app.run(main)
