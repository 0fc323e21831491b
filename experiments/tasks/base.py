"""What every task offers to the training loop."""

import pathlib
from collections.abc import Callable, Sized
from typing import Any, NamedTuple

import grain

from lorax import training

Scores = dict[str, Any]


def asked(rows: int, held_out: Sized) -> int:
    """Returns how many rows of a held-out set a field asks for; 0 means all."""
    return min(rows or len(held_out), len(held_out))


class Task(NamedTuple):
    """A task with its data encoded for one model.

    Attributes:
      train: batches, indexed by step.
      loss_fn: `(params, batch) -> (mean loss, {"weight": what it is the mean over})`,
        written for plain parameters; with a reference, `(params, batch, said)`.
      evaluate: `(params) -> scores` on a part of the validation set, cheap enough to be
        called during training; `params` are merged, or `unmerged.Unmerged`.
      report: `(params, workdir) -> final scores`: on as much of the validation set as
        `eval.final_rows` says, and on the test set if that is asked for.
      reference: `(frozen, params, batch) -> said`, the outputs of frozen models on a
        batch, see `lorax.training`; None if the loss needs none.
      frozen: what the reference reads beside the base, such as a teacher's parameters;
        None: the adapters that training begins with.
    """

    train: grain.MapDataset
    loss_fn: Callable[..., Any]
    evaluate: Callable[[Any], Scores]
    report: Callable[[Any, pathlib.Path], Scores]
    reference: training.Reference | None = None
    frozen: Any = None
