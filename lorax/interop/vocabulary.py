"""Resizes a vocabulary: the embedding, and all parameters with a vocabulary axis."""

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
"""The logical axis that indexes tokens."""


def resize_embeddings(
    model: nn.Module,
    params: PyTree,
    size: int,
    *,
    tokens: int | None = None,
    multiple_of: int = 1,
) -> tuple[nn.Module, PyTree]:
    """Changes the number of rows of a model's embedding and of outputs of its head.

        W[i] = W0[i] for i < tokens,    mean(W0[:tokens]) from there on

    for every parameter with a vocabulary axis: the embedding, an untied head, a head's
    bias. The mean is taken in float32 and rounded once. It makes a new token's logit
    the mean of the old ones, which is at most their log-mean-exp: each of n new tokens
    has at most 1 / (tokens + n) of the probability at first, and the remainder keeps
    its proportions (Hewitt; no such bound holds under a soft cap). transformers draws
    rows around the same mean with 1e-9 of the rows' covariance; here they equal it, so
    that resizing the same base always gives the same result, as its adapters require.

    Args:
      model: a model of a family in `lorax.models`.
      params: its parameters.
      size: the new number of rows, before rounding: the tokenizer's number of tokens.
      tokens: how many of the present rows are tokens; the rest are padding that was
        never trained (Qwen2.5 has 151,936 rows for 151,665 tokens), and are replaced
        too. Default: all.
      multiple_of: size is rounded up to a multiple of this, such as 128, for fast tiles
        and so that the mesh axis divides the vocabulary.

    Returns:
      The model with its new config, and the parameters in their original dtypes and
      shardings.

    Raises:
      ValueError: the size would remove tokens, a leaf is quantised, `params` is a
        `Base`, or the leaf's mesh axis does not divide the size.

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
            "params is a Base, made by lorax.init; resize the parameters before init"
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
    """The new number of rows; ValueError if tokens would be lost."""
    for name, given in ("size", size), ("tokens", tokens), ("multiple_of", multiple_of):
        if not _checks.is_whole(given) or given < 1:
            raise ValueError(f"{name}={given!r}; give a whole number >= 1")
    if tokens > vocabulary:
        raise ValueError(f"tokens={tokens}, but the embedding has {vocabulary} rows")
    if size < tokens:
        raise ValueError(
            f"size={size} would remove some of the {tokens} tokens; if rows from "
            f"{size} on are padding, pass tokens={size}"
        )
    return -(-size // multiple_of) * multiple_of


def _grown(path: str, leaf: Any, axis: int, tokens: int, rows: int) -> jax.Array:
    """One leaf with so many rows, in the same sharding."""
    if tree.is_quantized(leaf):
        raise ValueError(
            f"{path}: the leaf is quantised, and only dense leaves can be resized: "
            "load the model without quantize=, resize it, and then call lorax.quantize"
        )
    leaf = jnp.asarray(leaf)
    shape = (*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :])
    try:
        leaf.sharding.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"{path}: {rows} rows cannot be sharded as {leaf.shape[axis]} were, by "
            f"{leaf.sharding}; round them up with multiple_of="
        ) from error
    grow = functools.partial(_extended, axis=axis, tokens=tokens, rows=rows)
    return jax.jit(grow, out_shardings=leaf.sharding)(leaf)


def _extended(leaf: jax.Array, *, axis: int, tokens: int, rows: int) -> jax.Array:
    kept = jax.lax.slice_in_dim(leaf, 0, tokens, axis=axis)
    mean = jnp.mean(kept, axis, jnp.float32, keepdims=True).astype(leaf.dtype)
    shape = (*leaf.shape[:axis], rows - tokens, *leaf.shape[axis + 1 :])
    return jnp.concatenate([kept, jnp.broadcast_to(mean, shape)], axis)
