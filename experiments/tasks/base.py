"""What every task offers to the training loop."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import grain

Scores = dict[str, Any]


class Task(NamedTuple):
    """A task with its data encoded for one model.

    Attributes:
      train: batches, indexed by step.
      loss_fn: `(params, batch) -> (mean loss, {"weight": what it is the mean over})`,
        written for plain parameters.
      evaluate: merged parameters to scores on a part of the validation set, cheap
        enough for now and then.
      report: merged parameters and the workdir to the final scores: the whole
        validation set, and the test set if the config asks for it.
    """

    train: grain.MapDataset
    loss_fn: Callable[..., Any]
    evaluate: Callable[[Any], Scores]
    report: Callable[[Any, pathlib.Path], Scores]
