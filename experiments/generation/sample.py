"""Samples text from a decoder, in one jitted loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.generation import decoder


def sample_text(
    key: jax.Array,
    model: decoder.Decoder,
    params: Any,
    prompt: bytes,
    *,
    length: int,
    context: int,
    temperature: float,
) -> str:
    """Continues `prompt` by `length` bytes.

    Args:
      key: a typed key; the same key gives the same text.
      model: the decoder.
      params: its parameters, merged ones if it was adapted.
      prompt: bytes to start from, at least one.
      length: bytes to add.
      context: bytes the model sees, at most as many as it was trained on.
      temperature: of the softmax; 0 is greedy.

    Returns:
      The prompt and its continuation.
    """
    if not prompt:
        raise ValueError("eval.prompt is empty: give at least one byte to continue")
    tokens = np.zeros(max(len(prompt) + length, context), np.int32)
    tokens[: len(prompt)] = np.frombuffer(prompt, np.uint8)
    end = len(prompt) + length
    tokens = _continue(
        model, context, key, params, tokens, len(prompt), end, temperature
    )
    return bytes(np.asarray(tokens[:end], np.uint8)).decode("utf-8", "replace")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(
    model: decoder.Decoder,
    context: int,
    key: jax.Array,
    params: Any,
    tokens: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """Fills `tokens[begin:end]`, with a pass over the whole window for each byte.

    Attention is causal, so bytes of the window that are not filled yet are never seen.
    """

    def add(i: jax.Array, tokens: jax.Array) -> jax.Array:
        start = jnp.maximum(i - context, 0)
        window = jax.lax.dynamic_slice(tokens, (start,), (context,))
        logits: jax.Array = model.apply({"params": params}, window[None])  # type: ignore[assignment]
        draw = jax.random.categorical(
            jax.random.fold_in(key, i),
            logits[0, i - 1 - start] / jnp.maximum(temperature, 1e-6),
        )
        return tokens.at[i].set(draw)

    return jax.lax.fori_loop(begin, end, add, tokens)
