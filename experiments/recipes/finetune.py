"""Adapts a Hugging Face checkpoint to a task, and reports the task's scores.

    lorax run --config=gpt2_e2e_lora:runlocal

The workdir gets `metrics.jsonl`, `adapter/` (`lorax.checkpoint.load_adapters`),
`results.json`, and what the task writes; and, if the init moved a part of the base,
`initial/`, with which `experiments.export` makes an adapter for the original base.
"""

import contextlib
import functools
import json
import math
import pathlib
from typing import Any

import jax
import ml_collections
import rich.console

from experiments import tasks
from experiments.generation import loading, quantizing, unmerged
from experiments.machine import disk, distributed, placement
from experiments.reading import plugins
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
from experiments.trainer.fit import Output, fit, schedule_of
from lorax import inits
from lorax.types import Adapters

RANDOM = "random base: a smoke test, not a result"


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Runs the whole experiment and returns the values of `results.json`.

    Args:
      config: as `configs/gpt2_e2e_lora.py` returns it.
      workdir: folder for everything that the run writes.
    """
    # ----------------------------------------------------------- model, task
    plugins.load(config)
    folder, primary = pathlib.Path(workdir), distributed.is_primary()
    console = rich.console.Console(soft_wrap=False, quiet=not primary)
    key = jax.random.key(config.run.seed)
    place = placement.make_place(config.sharding)
    (method,) = config.run.methods
    targets = objects.make_targets(method, config.adapter)
    # what an init moves into the adapters comes out of the dense kernels
    late = not all(inits.of_target(target).keeps_base for target in targets)
    model, base, tokenizer = loading.load_base(
        config.model, jax.random.fold_in(key, 0), place, dense=late
    )
    placed = place.params(model, base)
    if placed:
        console.print(str(placed), highlight=False)
    task = tasks.TASKS[config.data.task](config, model, tokenizer, place)

    keep = keeping.make_keep(config, folder)
    fresh = keep is None
    with contextlib.ExitStack() as stack:
        stack.enter_context(place.scope())
        log = None
        if primary:
            writer = metric_log.Writer(folder, fresh, config.run.wandb)
            log = stack.enter_context(writer)
        bars = stack.enter_context(progress.bars(console))
        before = task.evaluate(unmerged.Unmerged({}, base))

        # ----------------------------------------------------------- training
        rate = config.optimizer.learning_rate[method]
        prepared = prepare.prepare(
            jax.random.fold_in(key, 1),
            prepare.Problem(
                task.loss_fn,
                base,
                targets,
                optimizers.make_optimizer(rate, config.run.steps, config.optimizer),
                task.train,
                quantizing.rules(config.model.quantize) if late else None,
                task.reference,
                task.frozen,
            ),
            clip_norm=config.optimizer.clip_norm,
            calibration=prepare.calibration_of(config.adapter),
            place=place,
            placed=placed,
            merge=unmerged.Unmerged,
            tell=functools.partial(progress.tell_targets, console),
        )
        done = fit(
            prepared,
            task.train,
            schedule_of(config),
            Output(method, bars, log),
            evaluate=task.evaluate,
            keep=keep,
            guard=nonfinite.Guard(folder, config.run.skip_nonfinite),
        )

        # ------------------------------------------------------------- report
        results: dict[str, Any] = {
            "steps": config.run.steps,
            "trainable": done.trainable,
            "trainable_share": done.trainable / metrics.size(base),
            **({} if math.isnan(done.step_ms) else {"step_ms": done.step_ms}),
            **{f"base_{name}": value for name, value in before.items()},
            **done.evaluation,
            **task.report(done.merged(), folder),
        }
        numbers = {k: v for k, v in results.items() if isinstance(v, int | float)}
        if log:
            log.write("final", config.run.steps, numbers)

    # ----------------------------------------------------------------- finish
    if config.model.random:
        results["note"] = RANDOM
    keeping.save_and_verify(folder / "adapter", done.adapters, done.params)
    if done.initial is not None:
        keeping.save_and_verify(folder / "initial", done.initial, done.params)
    if primary:
        disk.replace(folder / "results.json", json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        console.print(f"{name:>20}  {value}", highlight=False)
    console.print(f"Written to {folder}: adapter/ metrics.jsonl results.json")
    return results


def score(
    config: ml_collections.ConfigDict, adapter: str | None, folder: pathlib.Path
) -> dict[str, Any]:
    """Returns the task's scores.

    Args:
      config: of a run of `experiments.recipes.finetune`.
      adapter: folder of adapters, lorax's or PEFT's; None scores the base.
      folder: where the task writes its files.
    """
    plugins.load(config)
    key = jax.random.fold_in(jax.random.key(config.run.seed), 0)
    model, params, tokenizer = loading.load_base(config.model, key)
    task = tasks.TASKS[config.data.task](config, model, tokenizer)
    adapters: Adapters = {}
    if adapter:
        adapters, params = loading.load_adapters(adapter, model, params)
    return task.report(unmerged.Unmerged(adapters, params), folder)
