"""Labelled sentences as text to text: T5 reads a prompt and writes the label's name.

A prompt is the set's name and the sentences, "sst-2 sentence: ...", as in T5's own
mixture; the output must equal the label's name exactly.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments.data import batches, tokenization
from experiments.data.examples import Example
from experiments.data.sources import classification, glue
from experiments.generation import unmerged
from experiments.machine import placement
from experiments.tasks import base, losses
from experiments.tasks.base import Scores, Task
from lorax.models import decoding, t5


def make_text_to_text(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    place: placement.Place = placement.ALONE,
) -> Task:
    """Returns the task of `config.data`.

    Raises:
      ValueError: the labels are numbers.
    """
    data, lengths = config.data, config.data.lengths
    pad, eos = tokenization.padding_id(tokenizer), _eos(tokenizer)
    train, valid = (glue.load_split(data, split) for split in ("train", "valid"))
    if not train.labels:
        raise ValueError(f"{data.name} has numbers, not labels with names to write")
    names = Names(train.labels, [[*tokenizer.encode(n), *eos] for n in train.labels])
    write = decoding.make_generate(
        decoding.sequence_to_sequence(model, names.longest + 1).map(unmerged.either),
        batch=config.eval.batch_size,
        eos=eos,
        pad=pad,
        bucket=max(lengths),
    )
    held_out = _encoded(tokenizer, data, valid, data.valid_rows)

    def accuracy(params: Any, rows: int) -> Scores:
        asked = held_out[: base.asked(rows, held_out)]
        prompts = [row["tokens"].tolist() for row in asked]
        found = map(tokenizer.decode, write((params,), prompts, names.longest))
        true = [names.texts[int(row["label"])] for row in asked]
        right = [text.strip() == name for text, name in zip(found, true, strict=True)]
        return {"valid_accuracy": float(np.mean(right))}

    return Task(
        batches.training_batches(
            _encoded(tokenizer, data, train, data.train_rows),
            data.batch_size,
            lengths,
            pad,
            config.run.seed,
            names.collate,
            place.part(data.batch_size),
        ),
        make_loss(model, config.run.label_smoothing, config.run.loss_chunk),
        lambda params: accuracy(params, config.eval.rows),
        lambda params, _: accuracy(params, config.eval.final_rows),
    )


class Names(NamedTuple):
    """The names of the labels.

    Attributes:
      texts: by label.
      ids: their tokens, with EOS.
    """

    texts: Sequence[str]
    ids: Sequence[list[int]]

    @property
    def longest(self) -> int:
        """The number of tokens in the longest name."""
        return max(map(len, self.ids))

    def collate(self, example: Example, length: int, fill: int) -> dict[str, Any]:
        """Returns a row of a batch: the prompt padded to `length`, and the name."""
        label, tokens = int(example["label"]), example["tokens"]
        target = self.ids[label]
        rest = self.longest - len(target)
        return {
            "inputs": np.pad(tokens, (0, length - len(tokens)), constant_values=fill),
            "real": np.arange(length) < len(tokens),
            "targets": np.array([*target, *[fill] * rest], np.int32),
            "weights": np.array([1.0] * len(target) + [0.0] * rest, np.float32),
            "bytes": np.array(len(self.texts[label].encode())),
        }


def _encoded(
    tokenizer: tokenization.Tokenizer,
    data: ml_collections.ConfigDict,
    found: classification.Data,
    rows: int,
) -> list[Example]:
    """Returns the first `rows` of a split as prompts; 0: all."""
    longest = max(data.lengths)
    return [
        {
            "tokens": np.array(_prompt(tokenizer, data.name, row, longest)),
            "label": np.array(row.label, np.int32),
        }
        for row in found.rows[: rows or None]
    ]


def make_loss(model: Any, smoothing: float = 0.0, chunk: int = losses.AUTO) -> Any:
    """Returns the cross-entropy of the names to write."""

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        shifted = t5.shift_right(batch["targets"], model.config)
        inputs, real = batch["inputs"], batch["real"]

        def read(**how: Any) -> jax.Array:
            return model.apply({"params": params}, inputs, shifted, real=real, **how)

        return losses.of_model(model, params, batch, read, smoothing, chunk)

    return loss_fn


def _eos(tokenizer: tokenization.Tokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def _prompt(
    tokenizer: tokenization.Tokenizer,
    name: str,
    row: classification.Labelled,
    longest: int,
) -> list[int]:
    """Returns the tokens of a prompt, truncated if it is too long, and EOS."""
    text = f"{name.lower()} sentence: {row.first}"
    if row.second is not None:
        text = f"{name.lower()} sentence1: {row.first} sentence2: {row.second}"
    eos = _eos(tokenizer)
    return [*tokenizer.encode(text)[: longest - len(eos)], *eos]
