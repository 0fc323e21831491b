"""Each method's learning rate: a geometric sweep until the best rate is inside it.

Every rate trains for as long as the config says, and is judged on the `selection`
documents, which no reported figure uses.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping

import ml_collections
import rich.console
import rich.table

from experiments.data import windows
from experiments.data.sources import documents
from experiments.machine import disk
from experiments.recipes import byte_model, pretrain
from experiments.search import bracketing
from experiments.trainer import metric_log, metrics, nonfinite, objects, progress
from experiments.trainer.fit import Output

Sweep = dict[float, float]
"""Learning rate -> bits per byte; infinite if the run diverged."""


def tune(
    config: ml_collections.ConfigDict, folder: pathlib.Path, *, factor: float, most: int
) -> dict[str, Sweep]:
    """Sweeps every method of the config, prints the table and writes `sweep.json`.

    Args:
      config: as `configs/quickstart.py` returns it; the sweep starts at its learning
        rates.
      folder: for `sweep.json` and `metrics.jsonl`.
      factor: ratio of neighbouring learning rates.
      most: maximum number of learning rates per method.
    """
    console = rich.console.Console()
    with metric_log.Writer(folder) as log:
        score = make_score(config, console, log, folder)
        sweeps = {}
        for method in config.run.methods:
            sweeps[method] = bracketing.bracket(
                functools.partial(score, method),
                config.optimizer.learning_rate[method],
                factor,
                most,
            )
    console.print(table(sweeps))
    told = {method: _finite(sweep) for method, sweep in sweeps.items()}
    disk.replace(folder / "sweep.json", json.dumps(told, indent=2) + "\n")
    return sweeps


def make_score(
    config: ml_collections.ConfigDict,
    console: rich.console.Console,
    log: metric_log.Writer,
    folder: pathlib.Path,
) -> Callable[[str, float], float]:
    """Returns `(method, learning rate) -> bits per byte` on the selection documents.

    Args:
      config: of the runs.
      console: shows progress and diverged runs.
      log: gets every score.
      folder: gets the batch at which a run diverged.
    """
    topics = documents.topics()
    selection = windows.evaluation_batches(
        topics.selection, config.eval.batch_size, config.data.length
    )
    model = objects.make_model(config.model)
    loss_fn = objects.make_loss(model)
    bits_per_byte = metrics.make_bits_per_byte(loss_fn)
    with progress.bars(console) as bars:
        base = pretrain.load_or_train(config, model, bars, log)
    ground = byte_model.Ground(loss_fn, base, topics.train, folder)

    def score(method: str, rate: float) -> float:
        try:
            with progress.bars(console) as bars:
                output = Output(method, bars)
                fit = byte_model.adapt(
                    config, method, ground, output, learning_rate=rate
                )
        except nonfinite.NonFiniteError as error:
            console.print(f"{method}, learning rate {rate:g}: {error}")
            return math.inf
        bits = bits_per_byte(fit.merged(), selection)
        log.write(method, 0, {"learning_rate": rate, "selection_bpb": bits})
        return bits

    return score


def table(sweeps: Mapping[str, Sweep]) -> rich.table.Table:
    """Returns a table of the rates of every method, with the best in bold."""
    out = rich.table.Table("method", "learning rate", "selection bits/byte")
    for method, sweep in sweeps.items():
        best = min(sweep, key=sweep.__getitem__)
        for rate, bits in sweep.items():
            mark = "bold" if rate == best else ""
            out.add_row(method, f"{rate:g}", f"{bits:.4f}", style=mark)
    return out


def _finite(sweep: Sweep) -> dict[float, float | None]:
    """Replaces infinity, which JSON does not have, by None."""
    return {rate: bits if math.isfinite(bits) else None for rate, bits in sweep.items()}
