"""Labelled sentences or sentence pairs, for an encoder with a classification head."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments.data import batches, tokenization
from experiments.data.sources import classification, glue
from experiments.generation import unmerged
from experiments.machine import placement
from experiments.tasks import base
from experiments.tasks.base import Scores, Task
from experiments.tasks.scoring import labels
from lorax import sharding


def make_classify(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    place: placement.Place = placement.ALONE,
) -> Task:
    """Returns the task of `config.data`.

    Raises:
      ValueError: the model's head and the data differ in the number of labels.
    """
    data, lengths = config.data, config.data.lengths
    pad = tokenization.padding_id(tokenizer)
    found = {split: glue.load_split(data, split) for split in ("train", "valid")}
    require_labels(model, len(found["train"].labels) or 1, data.name)

    def encoded(split: str, rows: int = 0) -> list[Any]:
        own = found[split]
        own = own._replace(rows=own.rows[: rows or None])
        return classification.encode(tokenizer, own, max(lengths), split).examples

    train, valid = encoded("train", data.train_rows), encoded("valid", data.valid_rows)
    made = batches.training_batches(
        train,
        data.batch_size,
        lengths,
        pad,
        config.run.seed,
        batches.labelled,
        place.part(data.batch_size),
    )
    judged = config.eval.batch_size
    scored = make_scores(model, glue.scores_of(data.name), place)

    def held_out(rows: int) -> list[batches.Batch]:
        first, part = valid[: base.asked(rows, valid)], place.part(judged)
        return batches.evaluation_batches(
            first, judged, lengths, pad, batches.labelled, part
        )

    some, final = held_out(config.eval.rows), held_out(config.eval.final_rows)
    return Task(
        made,
        make_loss(model),
        lambda params: scored(params, some),
        lambda params, _: scored(params, final),
    )


def require_labels(model: Any, count: int, name: str) -> None:
    """Raises ValueError unless the model's head has `count` labels."""
    if model.config.labels != count:
        raise ValueError(
            f"the head has {model.config.labels} labels, but {name} has {count}: "
            f"set config.model.labels to {count}"
        )


def make_scores(
    model: Any, names: Sequence[str], place: placement.Place
) -> Callable[[Any, Sequence[Any]], Scores]:
    """Returns `(params, batches) -> scores`, named as in `scoring.labels`."""
    predict = make_predict(model)

    def scored(params: Any, held_out: Sequence[Any]) -> Scores:
        collected = _collected(predict, params, map(place.put, held_out))
        return {f"valid_{name}": labels.SCORES[name](*collected) for name in names}

    return scored


def make_loss(model: Any) -> Any:
    """Returns the cross-entropy of the labels, or the squared error of a number."""

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = _logits(model, params, batch)
        if model.config.labels == 1:
            loss = jnp.square(logits[:, 0] - batch["labels"])
        else:
            loss = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["labels"]
            )
        weight = batch["weights"].sum()
        return (loss * batch["weights"]).sum() / weight, {"weight": weight}

    return loss_fn


def _logits(model: Any, params: Any, batch: Any) -> jax.Array:
    """Returns the logits of sentences or images, `[batch, labels]`."""
    if "pixels" in batch:
        return model.apply({"params": params}, batch["pixels"])
    return model.apply({"params": params}, batch["tokens"], real=batch["real"])


def make_predict(model: Any) -> Any:
    """Returns `(params, batch) -> the predicted label or number of every row`."""

    @jax.jit
    @unmerged.either
    def predict(params: Any, batch: Any) -> jax.Array:
        logits = _logits(model, params, batch)
        return logits[:, 0] if model.config.labels == 1 else logits.argmax(-1)

    return predict


def _collected(
    predict: Any, params: Any, held_out: Iterable[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns predictions and labels, with every example once."""
    found = [(predict(params, b), b["labels"], b["index"]) for b in held_out]
    rows = [map(sharding.fetch, row) for row in found]  # all have been dispatched
    predicted, true, index = map(np.concatenate, zip(*rows, strict=True))
    return predicted[index >= 0], true[index >= 0]
