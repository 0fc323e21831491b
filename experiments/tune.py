"""Finds each method's learning rate: `python -m experiments.tune --config=...`.

A geometric sweep at the config's own length of training, judged on the `selection`
documents, which no reported figure uses. A sweep whose best lies at an end is extended
until the optimum is bracketed. Prints a table and writes `sweep.json`; the winners are
then written into the config by hand, with the sweep in its docstring.
"""

import json
import math
import pathlib
from collections.abc import Sequence

import rich.console
import rich.table
from absl import flags
from ml_collections import config_flags

from experiments import bracketing, command, disk

_CONFIG = config_flags.DEFINE_config_file("config", None, "Path of a config file.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for `sweep.json`; `runs/<run.name>-tune` by default."
)
_FACTOR = flags.DEFINE_float("factor", 2.0, "Ratio of neighbouring learning rates.")
_RUNS = flags.DEFINE_integer("runs", 9, "Most learning rates to try per method.")


def main(argv: Sequence[str]) -> None:
    """Sweeps every method of the config."""
    del argv
    from experiments import (
        factory,
        metrics,
        nonfinite,
        pretrain,
        progress,
        train,
        writer,
    )
    from experiments.data import documents, windows

    config = command.checked(_CONFIG.value)
    folder = pathlib.Path(_WORKDIR.value or f"runs/{config.run.name}-tune")
    console = rich.console.Console()
    topics = documents.topics()
    selection = windows.evaluation_batches(
        topics.selection, config.eval.batch_size, config.data.length
    )
    model = factory.make_model(config.model)
    loss_fn = factory.make_loss(model)
    bits_per_byte = metrics.make_bits_per_byte(loss_fn)

    sweeps: dict[str, dict[float, float]] = {}
    with writer.Writer(folder) as lines:
        with progress.bars(console) as bars:
            base = pretrain.load_or_train(config, model, bars, lines)
        for method in config.run.methods:

            def score(rate: float, method: str = method) -> float:
                arguments = (config, method, loss_fn, base, topics)
                try:
                    with progress.bars(console) as bars:
                        fit = train.adapt(*arguments, bars, None, folder, None, rate)
                except nonfinite.NonFiniteError as error:
                    console.print(f"{method}, learning rate {rate:g}: {error}")
                    return math.inf
                bits = bits_per_byte(fit.merged(), selection)
                lines.write(method, 0, {"learning_rate": rate, "selection_bpb": bits})
                return bits

            start = config.optimizer.learning_rate[method]
            sweeps[method] = bracketing.bracket(
                score, start, _FACTOR.value, _RUNS.value
            )

    table = rich.table.Table("method", "learning rate", "selection bits/byte")
    for method, sweep in sweeps.items():
        best = min(sweep, key=sweep.__getitem__)
        for rate, bits in sweep.items():
            mark = "bold" if rate == best else ""
            table.add_row(method, f"{rate:g}", f"{bits:.4f}", style=mark)
    console.print(table)
    told = {  # JSON has no infinity
        method: {
            rate: bits if math.isfinite(bits) else None for rate, bits in s.items()
        }
        for method, s in sweeps.items()
    }
    disk.replace(folder / "sweep.json", json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main)
