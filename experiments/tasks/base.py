"""What every task offers to the training loop."""

import pathlib
from collections.abc import Callable, Sized
from typing import Any, NamedTuple

import grain

from lorax import training

Scores = dict[str, Any]


def asked(rows: int, held_out: Sized) -> int:
    """How many rows of a held-out set a field asks for: 0 stands for all."""
    return min(rows or len(held_out), len(held_out))


class Task(NamedTuple):
    """A task with its data encoded for one model.

    Attributes:
      train: batches, indexed by step.
      loss_fn: `(params, batch) -> (mean loss, {"weight": what it is the mean over})`,
        written for plain parameters; with a reference `(params, batch, said)`.
      evaluate: parameters, merged ones or `unmerged.Unmerged`, to scores on a part of
        the validation set, cheap enough for now and then.
      report: such parameters and the workdir to the final scores: as much of the
        validation set as `eval.final_rows` says, and the test set if it is asked for.
      reference: `(frozen, params, batch) -> said`, what models that do not train say of
        a batch, see `lorax.training`; None: the loss needs none.
      frozen: what the reference reads beside the base, a teacher's parameters; None:
        the adapters that training begins with.
    """

    train: grain.MapDataset
    loss_fn: Callable[..., Any]
    evaluate: Callable[[Any], Scores]
    report: Callable[[Any, pathlib.Path], Scores]
    reference: training.Reference | None = None
    frozen: Any = None
