"""Pretrains a base, adapts it by every method of the config, and reports.

Everything lands in the workdir: `metrics.jsonl`, `tensorboard/`, `curves.png`,
`results.json` and `adapter/`, which `lorax.checkpoint.load_adapters` reads back.
"""

import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.console

from experiments.data import windows
from experiments.data.sources import documents
from experiments.generation.sample import sample_text
from experiments.machine import disk
from experiments.reading import plugins
from experiments.recipes import curves
from experiments.recipes.pretrain import load_or_train
from experiments.trainer import (
    metric_log,
    metrics,
    nonfinite,
    objects,
    optimizers,
    progress,
)
from experiments.trainer.fit import Around, Fit, Problem, fit, recipe_of
from lorax import checkpoint, tree

LABELS = {"base": "base", "lora": "LoRA", "full": "full"}


def train(
    config: ml_collections.ConfigDict, workdir: str
) -> dict[str, dict[str, float]]:
    """Runs the whole experiment.

    Args:
      config: as `configs/quickstart.py` returns it.
      workdir: folder for everything that the run writes.

    Returns:
      For "base" and each method the values of the closing table: `test_bpb` and
      `source_bpb` (held-out bits per byte), and for methods `trainable`,
      `trainable_share`, `opt_state_bytes`, `step_ms` and, beside "full", `recovered`.
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

    with metric_log.Writer(folder) as writer, progress.bars(console) as bars:
        base = load_or_train(config, model, bars, writer)
        results = {"base": evaluate(base)}
        models = {"base": base}
        fits: dict[str, Fit] = {}

        # ------------------------------------------------------- adaptation
        for method in config.run.methods:
            fits[method] = adapt(
                config, method, loss_fn, base, topics, bars, writer, folder, evaluate
            )
            models[method] = fits[method].merged()
            results[method] = dict(fits[method].evaluation)

        # ------------------------------------------------------------ report
        for name, params in models.items():
            results[name]["source_bpb"] = bits_per_byte(params, source)
        for name, done in fits.items():
            results[name] |= {
                "trainable": done.trainable,
                "trainable_share": done.trainable / metrics.size(base),
                "opt_state_bytes": done.opt_state_bytes,
                "step_ms": done.step_ms,
            }
            if "full" in results:
                results[name]["recovered"] = metrics.recovered(
                    *(results[key]["test_bpb"] for key in ("base", name, "full"))
                )
        for name, values in results.items():
            writer.write(f"final_{name}", config.run.steps, values)

    # ----------------------------------------------------------------- finish
    if "lora" in fits:
        done = fits["lora"]
        save_and_verify(folder / "adapter", done.adapters, done.params)
    curves.draw_curves(
        metric_log.read(folder), results["base"]["test_bpb"], folder / "curves.png"
    )
    disk.replace(folder / "results.json", json.dumps(results, indent=2) + "\n")
    labelled = {LABELS[name]: values for name, values in results.items()}
    console.print(metrics.summary_table(labelled, caption=describe_tuning(config)))
    for name in ("base", *config.run.methods[:1]):
        text = sample_text(
            jax.random.key(config.run.seed),
            model,
            models[name],
            config.eval.prompt.encode(),
            length=config.eval.sample_bytes,
            context=config.data.length,
            temperature=config.eval.temperature,
        )
        console.rule(f"sample: {LABELS[name]}", align="left")
        console.print(text, markup=False, highlight=False)
    console.rule()
    console.print(
        f"Written to {folder}: adapter/ curves.png metrics.jsonl results.json"
    )
    return results


def adapt(
    config: ml_collections.ConfigDict,
    method: str,
    loss_fn: Any,
    base: Any,
    topics: documents.Splits,
    bars: Any,
    writer: metric_log.Writer | None,
    folder: pathlib.Path,
    evaluate: Any = None,
    learning_rate: float | None = None,
) -> Fit:
    """Adapts the base to the topics, at the config's learning rate or another.

    Raises:
      NonFiniteError: too many steps were not finite; a batch of them is in the folder.
    """
    if learning_rate is None:
        learning_rate = config.optimizer.learning_rate[method]
    seed = config.run.seed
    problem = Problem(
        loss_fn,
        base,
        objects.make_targets(method, config.adapter),
        optimizers.make_optimizer(learning_rate, config.run.steps, config.optimizer),
        windows.training_batches(
            topics.train, config.data.batch_size, config.data.length, seed
        ),
        evaluate,
    )
    guard = nonfinite.Guard(folder, nonfinite.LIMIT)
    around = Around(method, bars, writer, guard=guard)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return fit(key, problem, recipe_of(config), around)


def save_and_verify(path: pathlib.Path, adapters: Any, params: Any) -> None:
    """Saves the adapters and asserts that what is read back is what was saved."""
    checkpoint.save_adapters(path, adapters, params, overwrite=True)
    restored = checkpoint.load_adapters(path, params=params)
    same = jax.tree.map(np.array_equal, restored, adapters)  # or it raises
    for name, array in checkpoint.load_frozen(path).items():
        same[name] = np.array_equal(array, tree.split(params)[1][name])
    if not all(jax.tree.leaves(same)):
        raise OSError(f"{path}: the adapters read back are not those saved")


def describe_tuning(config: ml_collections.ConfigDict) -> str:
    """The line below the table: the learning rates, and how they were found."""
    rates = ", ".join(
        f"{LABELS[m]} {config.optimizer.learning_rate[m]:g}" for m in config.run.methods
    )
    return f"Learning rates: {rates}. {config.optimizer.tuned}"
