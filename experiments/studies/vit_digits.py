"""What LoRA keeps of full fine-tuning on images: a small ViT, from five digits to ten.

    python -m experiments.studies.vit_digits --study_dir=docs/results/vit_digits

All parameters of a ViT (0.2 million) learn the digits 0 to 4 of scikit-learn's set. The
model is then adapted to all ten with 200 images, 300 steps of 32, and a new head. Half
of the set is held out: the first 300 of those images choose the rates, on separate
seeds, and the others give the error. The last arm is the same model trained from
scratch.

Every run is a line of `runs.jsonl`, so an interrupted study resumes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app

import lorax
from configs import vit_digits_lora
from experiments import paired
from experiments.data import batches
from experiments.data.vision import image_sets, look
from experiments.generation import loading
from experiments.machine import placement, tables
from experiments.studies.method import comparison, trial
from experiments.tasks import classify
from experiments.trainer import metrics, objects
from lorax import models

STEPS, EVERY, TUNED, ROWS = 300, 100, 300, 200
TUNING = (101, 102)  # seeds that choose rates
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 256}
FIRST = (0, 1, 2, 3, 4)


class Arm(NamedTuple):
    """One way to train.

    Attributes:
      patterns: what LoRA adapts beside the head; () for the head alone.
      rates: the grid of learning rates.
      method: "lora" or "full".
      pretrained: whether it starts from the first five digits, or from scratch.
    """

    patterns: tuple[str, ...]
    rates: tuple[float, ...]
    method: str = "lora"
    pretrained: bool = True


LOW, FULL = (1e-3, 3e-3, 9e-3), (3e-4, 9e-4, 2.7e-3)
ARMS = {
    "LoRA": Arm((models.ATTENTION, models.MLP), LOW),
    "LoRA, queries and values": Arm((models.QUERY_VALUE,), LOW),
    "the head alone": Arm((), LOW),
    "full fine-tuning": Arm((), FULL, "full"),
    "full, from nothing": Arm((), FULL, "full", pretrained=False),
}


class Setting(NamedTuple):
    """A model and its data.

    Attributes:
      loss_fn: `(params, batch) -> (loss, metrics)`.
      base: random initial parameters.
      train: seed -> batches, indexed by step.
      tuned: parameters -> error rate on the images that choose rates.
      report: likewise on the others.
    """

    loss_fn: Callable[..., Any]
    base: Any
    train: Callable[[int], Any]
    tuned: Callable[[Any], float]
    report: Callable[[Any], float]


def configured(**fields: Any) -> ml_collections.ConfigDict:
    """Returns the config of every run, without its arm."""
    config = vit_digits_lora.get_config("runlocal").unlock()
    config.run.steps = STEPS
    config.model.random.update(SIZES)
    config.adapter.rank, config.adapter.alpha = 4, 8.0
    config.optimizer.warmup_steps = STEPS // 10
    config.data.held_out, config.data.batch_size = 0.5, 32
    config.update_from_flattened_dict(fields)
    return config.lock()


def make_setting(config: ml_collections.ConfigDict, rows: int) -> Setting:
    """Initialises the model and reads the data; `rows` images train, 0 for all."""
    model, base, _ = loading.load_base(config.model, jax.random.key(0))
    seen = look.look_of(None, model.config.image, model.config.channels)
    found = image_sets.load(config.data)
    train = image_sets.encode(found["train"], seen)[: rows or None]
    valid = image_sets.encode(found["valid"], seen)
    scored = classify.make_scores(model, ("accuracy",), placement.ALONE)

    def errors(part: Sequence[Any]) -> Callable[[Any], float]:
        held_out = batches.evaluation_batches(part, 100, (0,), 0, batches.pictured)
        return lambda params: 1 - scored(params, held_out)["valid_accuracy"]

    def shuffled(seed: int) -> Any:
        size = config.data.batch_size
        return batches.training_batches(train, size, (0,), 0, seed, batches.pictured)

    report = errors(valid[TUNED:] or valid)
    return Setting(
        classify.make_loss(model), base, shuffled, errors(valid[:TUNED]), report
    )


def pretrained(config: ml_collections.ConfigDict) -> Any:
    """Trains all parameters on the first five digits, and returns them."""
    own = config.copy_and_resolve_references().unlock()
    own.data.classes, own.model.labels = FIRST, len(FIRST)
    setting = make_setting(own, 0)
    run = trial.make_run(own, setting.loss_fn, setting.base, setting.train, "full")
    end = run(
        0, 1e-3, setting.report, STEPS, lambda *at: lorax.merge(at[2].adapters, at[3])
    )
    print(f"error on the first five digits: {end.curve[-1]:.4f}")
    return end.watched[-1]


def study(
    name: str, config: ml_collections.ConfigDict, setting: Setting, runs: Any
) -> dict[str, Any]:
    """Makes an arm's missing runs, and returns its results."""
    arm = ARMS[name]
    make = trial.make_run(
        config, setting.loss_fn, setting.base, setting.train, arm.method
    )

    def line(part: str, seed: int, rate: float) -> list[float]:
        def made() -> list[float]:
            return make(seed, rate, getattr(setting, part), EVERY).curve

        return runs.get((name, part, rate, seed), made)

    def score(rate: float) -> float:
        return float(np.mean([line("tuned", seed, rate)[-1] for seed in TUNING]))

    rate = comparison.best_of_grid(score, arm.rates)
    seeds = range(1, 1 + comparison.SEEDS.value)
    targets = objects.make_targets(arm.method, config.adapter)
    adapters, _ = lorax.init(
        jax.random.key(0),
        setting.base,
        targets,
        lorax.discover(setting.loss_fn, setting.base, setting.train(0)[0]),
    )
    return {
        "rate": rate,
        "trained": metrics.size(adapters),
        "curves": [line("report", seed, rate) for seed in seeds],
    }


def table(results: dict[str, Any]) -> str:
    """Returns markdown with a row for each arm, compared with full fine-tuning."""
    best = np.array(results["full fine-tuning"]["curves"])[:, -1]
    rows = []
    for name, found in results.items():
        final = np.array(found["curves"])[:, -1]
        off = paired.difference(100 * (final - best), 2)
        rows.append(
            [
                name,
                f"{found['trained']:,}",
                f"{found['rate']:.2g}",
                f"{100 * final.mean():.2f} +- {100 * paired.standard_error(final):.2f}",
                "-" if name == "full fine-tuning" else off,
            ]
        )
    names = ["arm", "trained", "rate", "error, %", "minus full (95 %)"]
    return tables.markdown(names, rows)


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and prints the table."""
    del argv
    folder = comparison.folder("vit_digits")
    configs = {name: _of_arm(arm) for name, arm in ARMS.items()}
    settings = {name: _digest(config) for name, config in configs.items()}
    runs = comparison.Runs(folder / "runs.jsonl", settings)
    setting = make_setting(configured(), ROWS)
    learnt = pretrained(configured())
    head = {"classifier_out": setting.base["classifier_out"]}
    after, results = setting._replace(base={**learnt, **head}), {}
    for name, config in configs.items():
        own = after if ARMS[name].pretrained else setting
        results[name] = study(name, config, own, runs)
        jax.clear_caches()
    text = table(results)
    (folder / "table.md").write_text(f"{text}\n")
    print(text)


def _of_arm(arm: Arm) -> ml_collections.ConfigDict:
    return configured(**{"adapter.patterns": arm.patterns})


def _digest(config: ml_collections.ConfigDict) -> str:
    """Returns a digest of what a run depends on."""
    sections = [config[n].to_dict() for n in ("model", "adapter", "optimizer", "data")]
    told = json.dumps([STEPS, TUNED, ROWS, sections], default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


if __name__ == "__main__":
    app.run(main)
