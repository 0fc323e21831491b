"""Labelled sentences as text to text: T5 reads a prompt and writes the label's name.

A prompt is the set's name and the sentences, "sst-2 sentence: ...", as in T5's own
mixture; what is written is compared with the label's name, word for word.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.data import batches, tokenization
from experiments.data.examples import Example
from experiments.data.sources import classification
from experiments.machine import placement
from experiments.tasks import base, labelled_data
from experiments.tasks.base import Scores, Task
from experiments.tasks.respond import weighted_loss
from lorax.models import decoding, t5


def make_text_to_text(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    place: placement.Place = placement.ALONE,
) -> Task:
    """Returns the task of `config.data`.

    Raises:
      ValueError: labels that are numbers.
    """
    data, lengths = config.data, config.data.lengths
    pad = tokenization.padding_id(tokenizer)
    train, valid = (labelled_data.load(data, split) for split in ("train", "valid"))
    if not train.labels:
        raise ValueError(f"{data.name} has numbers, not labels, and no names to write")
    names = [tokenizer.encode(name) + _eos(tokenizer) for name in train.labels]
    longest = max(map(len, names))

    def collate(example: Example, length: int, fill: int) -> dict[str, np.ndarray]:
        count = length - len(example["tokens"])
        target = names[int(example["label"])]
        rest = longest - len(target)
        return {
            "inputs": np.pad(example["tokens"], (0, count), constant_values=fill),
            "real": np.arange(length) < len(example["tokens"]),
            "targets": np.array([*target, *[fill] * rest], np.int32),
            "weights": np.array([1.0] * len(target) + [0.0] * rest, np.float32),
            "bytes": np.array(len(train.labels[int(example["label"])].encode())),
        }

    def encoded(own: classification.Data, rows: int) -> list[Example]:
        kept: list[Example] = [
            {
                "tokens": np.array(_prompt(tokenizer, data.name, row, max(lengths))),
                "label": np.array(row.label, np.int32),
            }
            for row in own.rows[: rows or None]
        ]
        return kept

    engine = decoding.sequence_to_sequence(model, longest + 1)
    write = decoding.make_generate(
        engine,
        batch=config.eval.batch_size,
        eos=_eos(tokenizer),
        pad=pad,
        bucket=max(lengths),
    )

    def accuracy(params: Any, rows: Sequence[Example]) -> Scores:
        found = write((params,), [row["tokens"].tolist() for row in rows], longest)
        true = [train.labels[int(row["label"])] for row in rows]
        right = [tokenizer.decode(f).strip() == t for f, t in zip(found, true)]  # noqa: B905
        return {"valid_accuracy": float(np.mean(right))}

    held_out = encoded(valid, data.valid_rows)

    def report(params: Any, folder: pathlib.Path) -> Scores:
        del folder  # nothing is written but results.json
        return accuracy(
            params, held_out[: base.asked(config.eval.final_rows, held_out)]
        )

    return Task(
        batches.training_batches(
            encoded(train, data.train_rows),
            data.batch_size,
            lengths,
            pad,
            config.run.seed,
            collate,
            place.part(data.batch_size),
        ),
        make_loss(model, config.run.label_smoothing),
        lambda params: accuracy(
            params, held_out[: base.asked(config.eval.rows, held_out)]
        ),
        report,
    )


def make_loss(model: Any, smoothing: float = 0.0) -> Any:
    """Cross-entropy of the written names."""

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        shifted = t5.shift_right(batch["targets"], model.config)
        logits = model.apply(
            {"params": params}, batch["inputs"], shifted, real=batch["real"]
        )
        return weighted_loss(logits, batch, smoothing)

    return loss_fn


def _eos(tokenizer: tokenization.Tokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def _prompt(
    tokenizer: tokenization.Tokenizer,
    name: str,
    row: classification.Labelled,
    longest: int,
) -> list[int]:
    """Tokens of a prompt, its end cut where it is too long, and EOS."""
    text = f"{name.lower()} sentence: {row.first}"
    if row.second is not None:
        text = f"{name.lower()} sentence1: {row.first} sentence2: {row.second}"
    eos = _eos(tokenizer)
    return [*tokenizer.encode(text)[: longest - len(eos)], *eos]
