"""Pairs of texts with the same meaning, for sentence embeddings: in-batch negatives."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from experiments.data import batches, tokenization
from experiments.data.sources import glue, paths, sentence_pairs
from experiments.generation import loading, unmerged
from experiments.machine import placement
from experiments.tasks import base
from experiments.tasks.base import Scores, Task
from lorax import losses, sharding
from lorax.interop import sentences
from lorax.models.pooling import Pooling


def make_contrast(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    place: placement.Place = placement.ALONE,
) -> Task:
    """Returns the task of `config.data`.

    Pairs are the rows of the tables `data.train` and `data.valid` or, if these are
    empty, pairs of sentences with the same label from the set `data.name`.
    `data.pooling`, or else the checkpoint's modules.json, says how hidden states are
    pooled.

    Raises:
      ValueError: the model has no hidden states to pool.
    """
    data, lengths = config.data, config.data.lengths
    pad = tokenization.padding_id(tokenizer)
    embed = make_embed(model, pooling_of(config))

    def encoded(split: str, rows: int) -> list[Any]:
        pairs = read_pairs(data, split)[: rows or None]
        found = sentence_pairs.encode(tokenizer, pairs, max(lengths))
        if found.truncated:
            logging.warning("%s: %d texts cut short", split, found.truncated)
        return found.examples

    train, valid = encoded("train", data.train_rows), encoded("valid", data.valid_rows)
    made = batches.training_batches(
        train,
        data.batch_size,
        lengths,
        pad,
        config.run.seed,
        sentence_pairs.collate,
        place.part(data.batch_size),
    )
    judged = config.eval.batch_size

    def held_out(rows: int) -> list[batches.Batch]:
        first, part = valid[: base.asked(rows, valid)], place.part(judged)
        return batches.evaluation_batches(
            first, judged, lengths, pad, sentence_pairs.collate, part
        )

    scored = make_scores(embed, place)
    some, final = held_out(config.eval.rows), held_out(config.eval.final_rows)
    return Task(
        made,
        make_loss(embed, data.scale),
        lambda params: scored(params, some),
        lambda params, _: scored(params, final),
    )


def read_pairs(
    data: ml_collections.ConfigDict, split: str
) -> list[sentence_pairs.Pair]:
    """Returns the pairs of a split, "train" or "valid"."""
    if data[split]:
        return sentence_pairs.read(paths.find(data[split]))
    return sentence_pairs.of_labels(glue.load_split(data, split))


def pooling_of(config: ml_collections.ConfigDict) -> Pooling:
    """Returns the pooling that is asked for, or else the checkpoint's."""
    if config.data.pooling:
        return Pooling(config.data.pooling)
    if config.model.random:
        return Pooling()
    source = loading.find(config.model.source)
    try:
        return sentences.pooling(source)
    except FileNotFoundError:
        raise ValueError(
            f"config.data.pooling='': {source} has no modules.json that says how it "
            "pools; give one, such as 'mean' or 'cls'"
        ) from None


def make_embed(model: Any, pool: Pooling) -> Callable[..., jax.Array]:
    """Returns `(params, tokens, real) -> float32 [batch, width]`."""
    head = getattr(model.config, "head", None)
    if head not in (None, "none"):
        raise ValueError(
            f"config.model.head: the encoder has the head {head!r}, but pairs need its "
            "hidden states; give 'none'"
        )
    how = {"hidden": True} if head is None else {}

    def embed(params: Any, tokens: jax.Array, real: jax.Array) -> jax.Array:
        hidden = model.apply({"params": params}, tokens, real=real, **how)
        return pool(hidden, real)

    return embed


def both(embed: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns `(params, batch) -> (anchors, positives)`, embedded in one batch."""

    def run(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        tokens, real = (
            x.reshape(-1, x.shape[-1]) for x in (batch["tokens"], batch["real"])
        )
        found = embed(params, tokens, real).reshape(*batch["tokens"].shape[:2], -1)
        return found[:, 0], found[:, 1]

    return run


def make_loss(embed: Callable[..., jax.Array], scale: float) -> Callable[..., Any]:
    """Returns the loss with in-batch negatives, `lorax.losses.in_batch_negatives`."""
    run = both(embed)

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = losses.in_batch_negatives(
            *run(params, batch), scale=scale, groups=batch["groups"]
        )
        weight = batch["weights"].sum()
        return (loss * batch["weights"]).sum() / weight, {"weight": weight}

    return loss_fn


def make_scores(
    embed: Callable[..., jax.Array], place: placement.Place
) -> Callable[[Any, Sequence[Any]], Scores]:
    """Returns `(params, batches) -> scores` for finding an anchor's group.

    Every anchor is looked up among the positives of all held-out pairs. The scores are
    the share of anchors whose nearest positive is of their group (`valid_recall_1`), or
    one of the five nearest (`valid_recall_5`), and the mean inverse rank of the first
    such positive (`valid_mrr`).
    """
    predict = jax.jit(unmerged.either(both(embed)))

    def scored(params: Any, held_out: Sequence[Any]) -> Scores:
        found = [
            (*predict(params, own), own["groups"], own["index"])
            for own in map(place.put, held_out)
        ]
        rows = [map(sharding.fetch, row) for row in found]
        anchors, positives, groups, index = map(np.concatenate, zip(*rows, strict=True))
        kept = index >= 0
        return retrieval(anchors[kept], positives[kept], groups[kept])

    return scored


def retrieval(anchors: Any, positives: Any, groups: Any) -> Scores:
    """Returns the scores of `make_scores` from embeddings `[n, width]`."""
    ranks = []
    for begin in range(0, len(anchors), 1024):
        part = slice(begin, begin + 1024)
        order = np.argsort(-(anchors[part] @ positives.T), axis=1, kind="stable")
        hit = groups[order] == groups[part][:, None]
        ranks.append(1 + np.argmax(hit, axis=1))
    rank = np.concatenate(ranks)
    return {
        "valid_recall_1": float(np.mean(rank <= 1)),
        "valid_recall_5": float(np.mean(rank <= 5)),
        "valid_mrr": float(np.mean(1 / rank)),
    }
