"""Pretrains a base, adapts it by every method of the config, and reports.

Everything is written to the workdir: `metrics.jsonl`, `tensorboard/`, `curves.svg`,
`results.json` and `adapter/`, which `lorax.checkpoint.load_adapters` reads back.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import rich.console

from experiments.data import windows
from experiments.data.sources import documents
from experiments.generation import decoder
from experiments.generation.sample import sample_text
from experiments.machine import disk
from experiments.reading import plugins
from experiments.recipes import curves
from experiments.recipes.pretrain import load_or_train
from experiments.trainer import (
    keeping,
    metric_log,
    metrics,
    nonfinite,
    objects,
    optimizers,
    prepare,
    progress,
)
from experiments.trainer.fit import Fit, Output, fit, schedule_of

LABELS = {"base": "base", "lora": "LoRA", "full": "full"}


def train(
    config: ml_collections.ConfigDict, workdir: str
) -> dict[str, dict[str, float]]:
    """Runs the whole experiment.

    Args:
      config: as `configs/quickstart.py` returns it.
      workdir: folder for everything that the run writes.

    Returns:
      For "base" and each method, the values of the closing table: `test_bpb` and
      `source_bpb` (held-out bits per byte) and, for methods, `trainable`,
      `trainable_share`, `opt_state_bytes`, `step_ms` and, if "full" ran, `recovered`.
    """
    # ------------------------------------------------------------------ setup
    plugins.load(config)
    folder = pathlib.Path(workdir)
    console = rich.console.Console(soft_wrap=False)

    # ------------------------------------------------------------------- data
    topics = documents.topics()
    size = (config.eval.batch_size, config.data.length)
    test = windows.evaluation_batches(topics.test, *size)
    source = windows.evaluation_batches(
        documents.source_test(), *size, limit=config.eval.source_bytes
    )

    # ------------------------------------------------------------------ model
    model = objects.make_model(config.model)
    loss_fn = objects.make_loss(model)
    bits_per_byte = metrics.make_bits_per_byte(loss_fn)

    def evaluate(params: Any) -> dict[str, float]:
        return {"test_bpb": bits_per_byte(params, test)}

    written = metric_log.Writer(folder, project=config.run.wandb)
    with written as log, progress.bars(console) as bars:
        base = load_or_train(config, model, bars, log)
        results = {"base": evaluate(base)}

        # ------------------------------------------------------- adaptation
        ground = Ground(loss_fn, base, topics.train, folder)
        fits = {}
        for method in config.run.methods:
            output = Output(method, bars, log)
            fits[method] = adapt(config, method, ground, output, evaluate)
            results[method] = dict(fits[method].evaluation)

        # ------------------------------------------------------------ report
        models = {"base": base} | {name: done.merged() for name, done in fits.items()}
        for name, params in models.items():
            results[name]["source_bpb"] = bits_per_byte(params, source)
        for name, done in fits.items():
            results[name] |= cost_and_gain(done, results, name, base)
        for name, values in results.items():
            log.write(f"final_{name}", config.run.steps, values)

    # ----------------------------------------------------------------- finish
    if "lora" in fits:
        done = fits["lora"]
        keeping.save_and_verify(folder / "adapter", done.adapters, done.params)
    curves.draw_curves(metric_log.read(folder), results["base"]["test_bpb"], folder)
    disk.replace(folder / "results.json", json.dumps(results, indent=2) + "\n")
    labelled = {LABELS[name]: values for name, values in results.items()}
    console.print(metrics.summary_table(labelled, caption=describe_tuning(config)))
    for name in ("base", *config.run.methods[:1]):
        show_sample(console, config, model, models[name], LABELS[name])
    console.rule()
    console.print(
        f"Written to {folder}: adapter/ curves.svg metrics.jsonl results.json"
    )
    return results


class Ground(NamedTuple):
    """What all methods start from.

    Attributes:
      loss_fn: `(params, batch) -> (loss, metrics)`.
      base: the parameters to adapt.
      documents: to train on.
      folder: where the batch of a non-finite step is written.
    """

    loss_fn: Callable[..., Any]
    base: Any
    documents: Sequence[documents.Document]
    folder: pathlib.Path


def adapt(
    config: ml_collections.ConfigDict,
    method: str,
    ground: Ground,
    output: Output,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    learning_rate: float | None = None,
) -> Fit:
    """Adapts the base to the documents, at the config's learning rate or another.

    Raises:
      NonFiniteError: too many steps were not finite; the last batch is in the folder.
    """
    if learning_rate is None:
        learning_rate = config.optimizer.learning_rate[method]
    seed, data = config.run.seed, config.data
    batches = windows.training_batches(
        ground.documents, data.batch_size, data.length, seed
    )
    prepared = prepare.prepare(
        jax.random.fold_in(jax.random.key(seed), 1),
        prepare.Problem(
            ground.loss_fn,
            ground.base,
            objects.make_targets(method, config.adapter),
            optimizers.make_optimizer(
                learning_rate, config.run.steps, config.optimizer
            ),
            batches,
        ),
        clip_norm=config.optimizer.clip_norm,
        calibration=prepare.calibration_of(config.adapter),
        tell=functools.partial(progress.tell_targets, output.bars.console),
    )
    guard = nonfinite.Guard(ground.folder, nonfinite.LIMIT)
    schedule = schedule_of(config)
    return fit(prepared, batches, schedule, output, evaluate=evaluate, guard=guard)


def cost_and_gain(
    done: Fit, results: dict[str, dict[str, float]], name: str, base: Any
) -> dict[str, float]:
    """Returns what a method trained, what it took, and its share of "full"'s gain.

    Args:
      done: the method's fit.
      results: has the `test_bpb` of every method.
      name: of the method.
      base: the parameters that it adapted.
    """
    values = {
        "trainable": done.trainable,
        "trainable_share": done.trainable / metrics.size(base),
        "opt_state_bytes": done.opt_state_bytes,
        "step_ms": done.step_ms,
    }
    if "full" in results:
        values["recovered"] = metrics.recovered(
            *(results[key]["test_bpb"] for key in ("base", name, "full"))
        )
    return values


def show_sample(
    console: rich.console.Console,
    config: ml_collections.ConfigDict,
    model: decoder.Decoder,
    params: Any,
    label: str,
) -> None:
    """Prints how a model continues the config's prompt."""
    text = sample_text(
        jax.random.key(config.run.seed),
        model,
        params,
        config.eval.prompt.encode(),
        length=config.eval.sample_bytes,
        context=config.data.length,
        temperature=config.eval.temperature,
    )
    console.rule(f"sample: {label}", align="left")
    console.print(text, markup=False, highlight=False)


def describe_tuning(config: ml_collections.ConfigDict) -> str:
    """Returns the line below the table: learning rates, and how they were tuned."""
    rates = ", ".join(
        f"{LABELS[m]} {config.optimizer.learning_rate[m]:g}" for m in config.run.methods
    )
    return f"Learning rates: {rates}. {config.optimizer.tuned}"
