"""Which optimiser of low-rank factors is fastest on the quickstart's real text?

    python -m experiments.studies.quickstart_optimizers --study_dir=runs/optimizers

The base and the task of `configs/quickstart.py`: a byte model of Python source learns
the English of its manual, with LoRA of rank 8 on every linear kernel. Every method gets
learning rates a factor 2 apart, on seed 0 and the `selection` documents, until the best
lies between two others (9 at most). That rate is then reported on other seeds and the
`test` documents, every few steps: mean, standard error, and the paired difference to
LoRA with its 95 % interval.

Each method's results go to a file of their own, so an interrupted study resumes.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
import rich.console
from absl import app, flags

from configs import quickstart
from experiments.data import windows
from experiments.data.sources import documents
from experiments.machine import disk
from experiments.recipes import pretrain
from experiments.search import bracketing
from experiments.studies.method import comparison, trial
from experiments.trainer import metric_log, metrics, objects, progress

_STEPS = flags.DEFINE_integer("study_steps", 90, "Steps of training.", lower_bound=2)
_EVERY = flags.DEFINE_integer("study_every", 10, "Steps between two evaluations.")
_LOCAL = flags.DEFINE_bool("study_toy", False, "Toy sizes, for a smoke test.")

AXES = ("step", "held-out bits per byte")
MOST = 9  # learning rates of a method


class Method(NamedTuple):
    """What a method changes in the config, and its first learning rate."""

    optimizer: str
    rate: float
    options: tuple[tuple[str, Any], ...] = ()
    init: str = "standard"
    init_options: tuple[tuple[str, Any], ...] = ()


METHODS = {
    "LoRA": Method("adamw", 1e-2),
    "LoRA+": Method("lora_plus", 4e-3, (("ratio", 16.0),)),
    "LoRA-Pro, factor": Method("lora_pro", 1e-2, (("mode", "factor"),)),
    "LoRA-GA": Method("adamw", 5e-3, (), "lora_ga", (("scale", "stable"),)),
    "LoRA-GA + LoRA-Pro, factor": Method(
        "lora_pro", 5e-3, (("mode", "factor"),), "lora_ga", (("scale", "stable"),)
    ),
    "Muon on b": Method("muon_factors", 1e-2),
}


def configured(method: Method, toy: bool, steps: int) -> ml_collections.ConfigDict:
    """Returns the quickstart's config with the method in place."""
    config = quickstart.get_config("runlocal" if toy else None).unlock()
    config.run.steps = steps
    config.optimizer.name = method.optimizer
    config.optimizer.options = method.options
    config.adapter.init = method.init
    config.adapter.options = method.init_options
    return config


def study(
    method: Method, loss_fn: Any, base: Any, config: Any, seeds: int, every: int
) -> dict[str, Any]:
    """Chooses a rate on seed 0 and the selection documents, and reports other seeds."""
    topics = documents.topics()
    size = config.eval.batch_size, config.data.length
    selection = windows.evaluation_batches(topics.selection, *size)
    test = windows.evaluation_batches(topics.test, *size)

    def training(seed: int) -> Any:
        return windows.training_batches(
            topics.train, config.data.batch_size, config.data.length, seed
        )

    run = trial.make_run(config, loss_fn, base, training)
    bits_per_byte = metrics.make_bits_per_byte(loss_fn)

    def choose(params: Any) -> float:
        return bits_per_byte(params, selection)

    def report(params: Any) -> float:
        return bits_per_byte(params, test)

    grid = bracketing.bracket(
        lambda rate: run(0, rate, choose, config.run.steps).curve[-1],
        method.rate,
        2.0,
        MOST,
    )
    rate = min(grid, key=grid.__getitem__)
    curves = [run(1 + seed, rate, report, every).curve for seed in range(seeds)]
    told = {f"{rate:.3g}": bits for rate, bits in grid.items()}
    return {"rate": rate, "grid": told, "curves": curves}


def main(argv: Sequence[str]) -> None:
    """Runs every method that has no results yet, prints the table, draws the figure."""
    del argv
    folder = comparison.folder("quickstart_optimizers")
    steps, every, toy = _STEPS.value, _EVERY.value, _LOCAL.value
    console = rich.console.Console()
    model = objects.make_model(configured(METHODS["LoRA"], toy, steps).model)
    loss_fn, results = objects.make_loss(model), {}
    with metric_log.Writer(folder) as lines, progress.bars(console) as bars:
        config = configured(METHODS["LoRA"], toy, steps)
        base = pretrain.load_or_train(config, model, bars, lines)
    for name, method in METHODS.items():
        path = folder / f"{name.replace(' ', '')}.json"
        settings = json.loads(
            json.dumps([method, steps, every, comparison.SEEDS.value, toy])
        )
        known = _read(path, settings)
        if known is None:
            config = configured(method, toy, steps)
            known = study(method, loss_fn, base, config, comparison.SEEDS.value, every)
            disk.replace(path, json.dumps({"settings": settings, **known}))
        results[name] = known
        print(f"{name}: {known['grid']}", flush=True)
    print(f"\n{comparison.table(results, every)}")
    title = "quickstart, LoRA of rank 8" + " (toy sizes: no result)" * toy
    comparison.draw({title: results}, folder / "curves.png", AXES, every)


def _read(path: pathlib.Path, settings: Any) -> dict[str, Any] | None:
    """Returns what an earlier run with the same settings found, or None."""
    if not path.exists():
        return None
    known = json.loads(path.read_text())
    return known if known.get("settings") == settings else None


if __name__ == "__main__":
    app.run(main)
