"""A vocabulary that grows: new rows of the embedding, and of what lies along it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax import _checks, models, tree
from lorax.models import table
from lorax.types import Base, PyTree

VOCAB = "vocab"
"""The logical axis that numbers tokens."""


def resize_embeddings(
    model: nn.Module,
    params: PyTree,
    size: int,
    *,
    tokens: int | None = None,
    multiple_of: int = 1,
) -> tuple[nn.Module, PyTree]:
    """Gives a model another number of rows in its embedding, and outputs in its head.

        W[i] = W0[i] for i < tokens,    mean(W0[:tokens]) from there on

    in float32, rounded once, of every parameter that lies along the vocabulary: the
    embedding, an untied head, a head's bias. The mean of all rows makes a new token's
    logit the mean of the old ones, which is at most their log-mean-exp: each of n new
    tokens has at most 1 / (tokens + n) of the probability at first, and what is left
    keeps its proportions (Hewitt; no such bound under a soft cap). transformers draws
    around the same mean with 1e-9 of the rows' covariance; here the rows are it, so
    that whoever resizes the same base has the same one, as its adapters need.

    Args:
      model: of a family of `lorax.models`.
      params: its parameters.
      size: rows afterwards, before rounding: the tokenizer's number of tokens.
      tokens: rows that are tokens' today; the rest is padding that no training has seen
        (Qwen2.5 has 151,936 rows for 151,665 tokens), and is new as well. Default: all.
      multiple_of: size is rounded up to a multiple of it, 128 for example: fast tiles,
        and a vocabulary that its mesh axis divides.

    Returns:
      The model with its new config, and the parameters in the dtypes and shardings that
      they had.

    Raises:
      ValueError: a size that would cut tokens off, a quantised leaf, a `Base`, or a
        size that the leaf's mesh axis does not divide.

    Example:
      >>> from lorax.models import gpt2
      >>> import jax, jax.numpy as jnp
      >>> model = gpt2.Model(gpt2.Config(6, 8, 4, 1, 2, 8))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
      >>> model, params = resize_embeddings(model, params, 7)
      >>> model.config.vocabulary, params["embed"]["embedding"].shape
      (7, (7, 4))

    References:
      Hewitt, Initializing New Word Embeddings for Pretrained Language Models,
      https://nlp.stanford.edu/~johnhew/vocab-expansion.html.
    """
    config: Any = model.config
    kept = config.vocabulary if tokens is None else tokens
    rows = _rows(config.vocabulary, kept, size, multiple_of)
    if isinstance(params, Base):
        raise ValueError(
            "params is a Base, made by lorax.init; resize the parameters before that"
        )
    family = models.FAMILIES[config.to_hf()["model_type"]]
    axes = table.logical_axes(family.entries(config), config.stacks, config.scan)
    leaves = tree.flatten(params)
    grown = {
        path: _grown(path, leaves[path], names.index(VOCAB), kept, rows)
        for path, names in axes.items()
        if VOCAB in names
    }
    made = model.clone(config=dataclasses.replace(config, vocabulary=rows))
    return made, tree.replace(params, grown)


def _rows(vocabulary: int, tokens: int, size: int, multiple_of: int) -> int:
    """The rows afterwards; ValueError where tokens would be lost."""
    for name, given in ("size", size), ("tokens", tokens), ("multiple_of", multiple_of):
        if not _checks.is_whole(given) or given < 1:
            raise ValueError(f"{name}={given!r}; give a whole number >= 1")
    if tokens > vocabulary:
        raise ValueError(f"tokens={tokens}, and the embedding has {vocabulary} rows")
    if size < tokens:
        raise ValueError(
            f"size={size} would cut off some of the {tokens} tokens; if rows from "
            f"{size} on are padding, say so by tokens={size}"
        )
    return -(-size // multiple_of) * multiple_of


def _grown(path: str, leaf: Any, axis: int, tokens: int, rows: int) -> jax.Array:
    """One leaf with so many rows, as it lay."""
    if tree.is_quantized(leaf):
        raise ValueError(
            f"{path}: the leaf is quantised, and rows are added to dense ones: load "
            "the model without quantize=, resize it, and then lorax.quantize"
        )
    leaf = jnp.asarray(leaf)
    shape = (*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :])
    try:
        leaf.sharding.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"{path}: {rows} rows cannot lie as {leaf.shape[axis]} did, by "
            f"{leaf.sharding}; round them up by multiple_of="
        ) from error
    grow = functools.partial(_extended, axis=axis, tokens=tokens, rows=rows)
    return jax.jit(grow, out_shardings=leaf.sharding)(leaf)


def _extended(leaf: jax.Array, *, axis: int, tokens: int, rows: int) -> jax.Array:
    kept = jax.lax.slice_in_dim(leaf, 0, tokens, axis=axis)
    mean = jnp.mean(kept, axis, jnp.float32, keepdims=True).astype(leaf.dtype)
    shape = (*leaf.shape[:axis], rows - tokens, *leaf.shape[axis + 1 :])
    return jnp.concatenate([kept, jnp.broadcast_to(mean, shape)], axis)
