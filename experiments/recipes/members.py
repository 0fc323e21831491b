"""Trains many LoRA adapters at once on one base, as `config.population` says.

    lorax run --config=quickstart \
        --config.population.learning_rate="(5e-3, 1e-2, 2e-2)"

One compiled step trains all members on the same batches, in the order of `run.seed`; a
member's own seed initialises its adapters. The workdir gets `metrics.jsonl`,
`results.json` and `members/<k>/`, which `lorax.checkpoint.load_adapters` reads back.
"""

import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import ml_collections
import optax
import rich.box
import rich.console
import rich.progress
import rich.table

import lorax
from experiments.data import windows
from experiments.data.sources import documents
from experiments.machine import disk
from experiments.reading import plugins
from experiments.recipes.byte_model import train as train_methods
from experiments.recipes.pretrain import load_or_train
from experiments.trainer import (
    keeping,
    metric_log,
    metrics,
    objects,
    optimizers,
    progress,
)
from experiments.trainer.loop import Clock, Compiled, Prepared, Step, loop
from lorax import population, training, tree


class Member(NamedTuple):
    """The values of one member."""

    seed: int
    learning_rate: float
    rank: int
    alpha: float


WHOLE = ("seed", "rank")
"""Fields of a member that are integers."""


def members(config: ml_collections.ConfigDict) -> list[Member]:
    """Reads `config.population`; [] if all of it is empty.

    Raises:
      ValueError: an unknown field, tuples of unequal length, or a value of the wrong
        kind.
    """
    given = {name: value for name, value in config.population.items() if value != ()}
    if unknown := sorted(set(given) - set(Member._fields)):
        raise ValueError(
            f"config.population.{unknown[0]}: members differ in "
            f"{', '.join(Member._fields)}; remove it, or run separate experiments"
        )
    for name, values in given.items():
        if not (isinstance(values, tuple) and all(_fits(name, v) for v in values)):
            wanted = "whole numbers" if name in WHOLE else "positive numbers"
            raise ValueError(
                f"config.population.{name}={values!r}; give a tuple of {wanted}, one "
                "for each member, such as (1, 2), or () for the config's own"
            )
    sizes = {name: len(values) for name, values in given.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"config.population has {sizes} values; the tuples are zipped, so give "
            "each the same length, or () for the config's own value in every member"
        )
    own = Member(
        config.run.seed,
        config.optimizer.learning_rate.lora,
        config.adapter.rank,
        config.adapter.alpha,
    )
    rows = zip(*given.values(), strict=True)
    return [own._replace(**dict(zip(given, row, strict=True))) for row in rows]


def _fits(name: str, value: Any) -> bool:
    """Whether a field of a member may have the value."""
    kind = int if name in WHOLE else (int, float)
    return isinstance(value, kind) and (value > 0 or name == "seed")


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains a population if the config has one, else every method of the config."""
    if members(config):
        return train(config, workdir)
    return train_methods(config, workdir)


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains all members and reports, with a row for each.

    Args:
      config: as `configs/quickstart.py` returns it, with a population.
      workdir: folder for everything that the run writes.

    Returns:
      "base": `{"test_bpb"}`; "members": for each, its values, `test_bpb` (held-out bits
      per byte), `trainable` and `skipped`; "step_ms": of all members together.
    """
    # ------------------------------------------------------------------ setup
    plugins.load(config)
    chosen = members(config)
    folder = pathlib.Path(workdir)
    console = rich.console.Console(soft_wrap=False)

    # ------------------------------------------------------------ data, model
    topics = documents.topics()
    size = (config.eval.batch_size, config.data.length)
    test = windows.evaluation_batches(topics.test, *size)
    model = objects.make_model(config.model)
    loss_fn = objects.make_loss(model)
    bits_per_byte = metrics.make_bits_per_byte(loss_fn)

    written = metric_log.Writer(folder, project=config.run.wandb)
    with written as log, progress.bars(console) as bars:
        base = load_or_train(config, model, bars, log)

        # ----------------------------------------------------------- training
        batches = windows.training_batches(
            topics.train, config.data.batch_size, config.data.length, config.run.seed
        )
        prepared = prepare_members(config, chosen, loss_fn, base, batches, bars)
        shared, report = prepared.params, Report(config, prepared, bars, log)
        trained = loop(
            prepared, batches, [report], clock=report.clock, steps=config.run.steps
        )

        # ------------------------------------------------------------- report
        rows: list[dict[str, Any]] = []
        for k, adapters in enumerate(population.unstack(trained)):
            keeping.save_and_verify(folder / "members" / str(k), adapters, shared)
            rows.append(
                {
                    **chosen[k]._asdict(),
                    "test_bpb": bits_per_byte(lorax.merge(adapters, shared), test),
                    "trainable": metrics.size(adapters),
                    "skipped": int(trained.state.skipped[k]),
                }
            )
            log.write(f"member_{k}", config.run.steps, rows[-1])

    # ----------------------------------------------------------------- finish
    results = {
        "base": {"test_bpb": bits_per_byte(base, test)},
        "members": rows,
        "step_ms": statistics.median(report.clock.seconds) * 1e3,
    }
    disk.replace(folder / "results.json", json.dumps(results, indent=2) + "\n")
    console.print(table(results))
    console.print(f"Written to {folder}: members/ metrics.jsonl results.json")
    return results


def prepare_members(
    config: ml_collections.ConfigDict,
    chosen: Sequence[Member],
    loss_fn: Callable[..., Any],
    base: Any,
    batches: grain.MapDataset,
    bars: rich.progress.Progress,
) -> Prepared:
    """Prepares all members as one program; they share the base."""

    def make_tx(learning_rate: float) -> optax.GradientTransformation:
        return optimizers.make_optimizer(
            learning_rate, config.run.steps, config.optimizer
        )

    # Keys as in `byte_model.adapt`, so that a member equals that run.
    keys = [jax.random.fold_in(jax.random.key(m.seed), 1) for m in chosen]
    init_keys, step_keys = zip(*map(jax.random.split, keys), strict=True)
    kernels = lorax.discover(loss_fn, base, batches[0])
    targets = objects.make_targets("lora", config.adapter)
    progress.tell_targets(bars.console, lorax.describe(base, targets, kernels))
    starts = []
    for of in zip(init_keys, chosen, strict=True):
        adapters, base = start(config, *of, base, kernels)
        starts.append(adapters)
    tx = optax.inject_hyperparams(make_tx)(learning_rate=1.0)
    rates = {"learning_rate": [m.learning_rate for m in chosen]}
    state = population.create_population(step_keys, starts, tx, base, hyperparams=rates)
    step = population.make_population_step(
        training.simple_loss(loss_fn), tx, clip_norm=config.optimizer.clip_norm
    )
    tokens = len(chosen) * batches[0]["targets"].size
    return Prepared(state, base, Compiled(step), tokens=tokens)


class Report:
    """A hook that moves the bar and writes each member's metrics at intervals.

    Attributes:
      clock: of the steps; every report is a lap.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        prepared: Prepared,
        bars: rich.progress.Progress,
        log: metric_log.Writer,
    ) -> None:
        """Adds a bar, and starts the clock."""
        name = f"{len(members(config))} x lora"
        self._meter = progress.Meter(bars, name, config.run.steps)
        self._every, self._tokens = config.run.log_every, prepared.tokens
        self._log, self.clock = log, Clock()

    def __call__(self, step: Step) -> None:
        """Reports if a report is due."""
        if not step.due(self._every):
            return
        loss = jax.device_get(step.metrics["loss"])  # [K]; waits for the step
        pace = self._tokens / self.clock.lap(step.number)
        self._meter.update(step.number, float(loss.mean()) * metrics.BITS, pace)
        for k, own in enumerate(loss):
            self._log.write(f"member_{k}", step.number, {"loss": float(own)})


def start(
    config: ml_collections.ConfigDict,
    key: jax.Array,
    member: Member,
    base: Any,
    kernels: Any,
) -> tuple[lorax.Adapters, Any]:
    """Returns a member's initial adapters, and the base with their frozen arrays.

    Members share a method's frozen arrays: those that the first member drew.

    Raises:
      ValueError: the init moves a part of the base.
    """
    adapter = config.adapter.copy_and_resolve_references()
    adapter.rank, adapter.alpha = member.rank, float(member.alpha)
    targets = objects.make_targets("lora", adapter)
    adapters, params = lorax.init(key, base, targets, kernels)
    if tree.split(params)[0] is not tree.split(base)[0]:
        raise ValueError(
            f"config.adapter.init={adapter.init!r} moves a part of the base into the "
            "adapters, but members share one base: use init='standard', or run the "
            "members one by one"
        )
    return adapters, params


def table(results: dict[str, Any]) -> rich.table.Table:
    """Returns the closing table, with a row for each member and the best in bold."""
    header = (
        "member",
        "held-out\nbits/byte",
        "learning\nrate",
        "rank",
        "alpha",
        "seed",
    )
    rows = results["members"]
    out = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        caption=f"Base: {results['base']['test_bpb']:.3f}. One step of all "
        f"{len(rows)} members: {results['step_ms']:.0f} ms.",
    )
    out.caption_justify = "left"
    skipped = any(row["skipped"] for row in rows)
    for name in (*header, "steps\nskipped") if skipped else header:
        out.add_column(name, justify="right", no_wrap=True)
    best = min(rows, key=lambda row: row["test_bpb"])
    for k, row in enumerate(rows):
        form = "{test_bpb:.3f}|{learning_rate:g}|{rank}|{alpha:g}|{seed}"
        form += "|{skipped}" if skipped else ""
        cells = form.format_map(row).split("|")
        out.add_row(str(k), *cells, style="bold" if row is best else "")
    return out
