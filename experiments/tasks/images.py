"""Labelled images, for a vision tower with a classification head."""

import pathlib
from typing import Any

import ml_collections

from experiments.data import batches, tokenization
from experiments.data.vision import image_sets, look
from experiments.generation import loading
from experiments.machine import placement
from experiments.tasks import base, classify
from experiments.tasks.base import Task

SIZE = (0,)  # one bucket: all images have the same size
PAD = 0  # never used: no example is shorter than another


def make_images(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    place: placement.Place = placement.ALONE,
) -> Task:
    """Returns the task of `config.data`; the tokenizer is not used.

    Raises:
      ValueError: the model's head and the data differ in the number of labels.
    """
    del tokenizer
    data, judged = config.data, config.eval.batch_size
    found = image_sets.load(data)
    classify.require_labels(model, len(found["train"].names), data.name)
    seen = look.look_of(
        folder_of(config.model), model.config.image, model.config.channels
    )
    train = image_sets.encode(found["train"], seen)[: data.train_rows or None]
    valid = image_sets.encode(found["valid"], seen)[: data.valid_rows or None]
    scored = classify.make_scores(model, ("accuracy",), place)

    def held_out(rows: int) -> list[batches.Batch]:
        first, part = valid[: base.asked(rows, valid)], place.part(judged)
        return batches.evaluation_batches(
            first, judged, SIZE, PAD, batches.pictured, part
        )

    some, final = held_out(config.eval.rows), held_out(config.eval.final_rows)
    return Task(
        batches.training_batches(
            train,
            data.batch_size,
            SIZE,
            PAD,
            config.run.seed,
            batches.pictured,
            place.part(data.batch_size),
        ),
        classify.make_loss(model),
        lambda params: scored(params, some),
        lambda params, _: scored(params, final),
    )


def folder_of(config: ml_collections.ConfigDict) -> pathlib.Path | None:
    """Returns the folder of a checkpoint; None for a randomly initialised model."""
    return None if config.random else loading.find(config.source)
