"""What arms share: the text and, by config, the base, its loss and evaluations."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import rich.console

from experiments.data import windows
from experiments.data.sources import documents
from experiments.generation import decoder
from experiments.recipes import pretrain
from experiments.trainer import metric_log, metrics, objects, progress


class Task(NamedTuple):
    """What an arm trains on.

    Attributes:
      loss_fn: `(params, batch) -> (loss, metrics)`.
      base: the parameters to adapt.
      choose: params -> bits per byte on the documents that choose rates.
      report: params -> bits per byte on the documents that are reported.
    """

    loss_fn: Callable[..., Any]
    base: Any
    choose: Callable[[Any], float]
    report: Callable[[Any], float]


class Setting:
    """Tasks by config, with each base trained once.

    Attributes:
      toy: whether sizes are toy sizes.
      topics: the documents.
    """

    def __init__(self, folder: pathlib.Path, toy: bool) -> None:
        """Reads the text.

        Args:
          folder: for the metrics of what is trained here.
          toy: whether sizes are toy sizes.
        """
        self.toy, self.topics = toy, documents.topics()
        self._folder = folder
        self._tasks: dict[tuple[str, int], Task] = {}

    def task(self, config: ml_collections.ConfigDict) -> Task:
        """Returns the task that a config describes; its base is loaded or trained.

        Args:
          config: in the quickstart's form. `adapter.prefix`, if given, is the number of
            learned positions before every sequence; they start as the first bytes of
            the training documents.
        """
        prefix = config.adapter.get("prefix", 0)
        key = pretrain.fingerprint(config), prefix
        if key not in self._tasks:
            self._tasks[key] = self._made(config, prefix)
        return self._tasks[key]

    def train(self, config: ml_collections.ConfigDict) -> Callable[[int], Any]:
        """Returns seed -> batches."""
        size = config.data.batch_size, config.data.length
        return lambda seed: windows.training_batches(self.topics.train, *size, seed)

    def _made(self, config: ml_collections.ConfigDict, prefix: int) -> Task:
        model = objects.make_model(config.model)
        with (
            metric_log.Writer(self._folder) as lines,
            progress.bars(rich.console.Console(stderr=True)) as bars,
        ):
            base = pretrain.load_or_train(config, model, bars, lines)
        if prefix:
            first = windows.stream(self.topics.train)[:prefix]
            model, base = decoder.with_prefix(model, base, first)
        loss_fn = objects.make_loss(model)
        bits_per_byte = metrics.make_bits_per_byte(loss_fn)

        def held_out(part: Any) -> Callable[[Any], float]:
            made = windows.evaluation_batches(
                part, config.eval.batch_size, config.data.length
            )
            return lambda params: bits_per_byte(params, made[:1] if self.toy else made)

        topics = self.topics
        return Task(loss_fn, base, held_out(topics.selection), held_out(topics.test))
