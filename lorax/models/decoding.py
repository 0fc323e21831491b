"""Generates tokens with a cache, greedy or sampled, in batches of unequal prompts.

    engine = decoding.causal(model, slots=512)
    generate = decoding.make_generate(engine, batch=16, eos=(2,))
    texts = generate((params,), prompts, max_tokens=100)

An `Engine` is a model as two pure functions of parameters; `engine.map(lorax.adapt)`
runs adapters unmerged, `generate((adapters, params), ...)`. Prompts are padded on the
left to a multiple of `bucket` and batches to a fixed number of rows, so there is one
compilation for every padded length and one for all further tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import sharding
from lorax.models import sampling

Tokens = list[int]
State = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Engine:
    """What decoding needs from a model.

    Attributes:
      prefill: `(*state, tokens [batch, time], real [batch, time])` to the logits
        `[batch, vocabulary]` of the first new token, and the cache.
      step: `(*state, tokens [batch, 1], cache)` to the next logits and cache.
      slots: tokens that the cache holds, new ones included.
      limit: tokens that the model can read, not counting padding; None: any number.
      start: token that the decoder of an encoder-decoder, and its cache, begin with;
        None: new tokens follow the prompt in the cache.
    """

    prefill: Callable[..., Any]
    step: Callable[..., Any]
    slots: int
    limit: int | None = None
    start: int | None = None

    def map(self, transform: Callable[[Callable[..., Any]], Any]) -> Engine:
        """Returns the engine with transformed functions, as in `map(lorax.adapt)`."""
        return dataclasses.replace(
            self, prefill=transform(self.prefill), step=transform(self.step)
        )


def per_example(engine: Engine) -> Engine:
    """Returns an engine for single examples, for transforms that add a batch axis.

    `per_example(engine).map(lorax.compose.route)` gives every row its own adapter:
    `generate((stacked, index, params), ...)` with `index: int [batch]`.
    """

    def prefill(params: Any, tokens: jax.Array, real: jax.Array) -> Any:
        logits, cache = engine.prefill(params, tokens[None], real[None])
        return logits[0], cache

    def step(params: Any, tokens: jax.Array, cache: Any) -> Any:
        logits, cache = engine.step(params, tokens[None], cache)
        return logits[0], cache

    return dataclasses.replace(engine, prefill=prefill, step=step)


def causal(model: Any, slots: int) -> Engine:
    """Returns the engine of a decoder with a cache of `slots` tokens.

    Args:
      model: `gpt2.Model`, `llama.Model`, or another with the same call and `cache`.
      slots: of the cache: the longest padded prompt plus the new tokens.
    """

    def read(params: Any, tokens: Any, real: Any, cache: Any) -> Any:
        logits, cache = model.apply(
            {"params": params}, tokens, real=real, cache=cache, last_only=True
        )
        return logits[:, 0], cache

    def prefill(params: Any, tokens: jax.Array, real: jax.Array) -> Any:
        return read(params, tokens, real, model.cache(len(tokens), slots))

    def step(params: Any, tokens: jax.Array, cache: Any) -> Any:
        return read(params, tokens, None, cache)

    return Engine(prefill, step, slots, getattr(model.config, "limit", None))


def sequence_to_sequence(model: Any, slots: int) -> Engine:
    """Returns the engine of an encoder-decoder; prompts go to the encoder.

    Args:
      model: `t5.Model`, or another with the same call and `cache`.
      slots: of the decoder's cache: the new tokens plus the start token.
    """
    start = model.config.start

    def prefill(params: Any, tokens: jax.Array, real: jax.Array) -> Any:
        cache = model.cache(len(tokens), slots, tokens.shape[1])
        first = jnp.full((len(tokens), 1), start, jnp.int32)
        logits, cache = model.apply(
            {"params": params}, tokens, first, real=real, cache=cache
        )
        return logits[:, -1], cache

    def step(params: Any, tokens: jax.Array, cache: Any) -> Any:
        logits, cache = model.apply({"params": params}, None, tokens, cache=cache)
        return logits[:, -1], cache

    return Engine(prefill, step, slots, start=start)


class Progress(NamedTuple):
    """Sequences being generated.

    Attributes:
      cache: of the engine.
      logits: `[batch, vocabulary]`, of the next token.
      history: int `[batch, slots]`, the tokens by slot of the cache.
      real: bool `[batch, slots]`.
      index: int32 []; the slot of the next token.
      keys: `[batch]`, the random key of every sequence.
      count: int32 []; new tokens so far.
      done: bool `[batch]`.
    """

    cache: Any
    logits: jax.Array
    history: jax.Array
    real: jax.Array
    index: jax.Array  # type: ignore[assignment]
    keys: jax.Array
    count: jax.Array  # type: ignore[assignment]
    done: jax.Array


def make_generate(
    engine: Engine,
    *,
    batch: int,
    eos: Sequence[int] = (),
    pad: int = 0,
    bucket: int = 64,
    chunk: int = 32,
    rule: sampling.Rule = sampling.GREEDY,
) -> Callable[..., list[Tokens]]:
    """Returns a function that continues prompts.

        generate(state, prompts, max_tokens, key=None, stop=None) -> new tokens of each

    `state` holds the first arguments of the engine's functions. Sampling needs a `key`,
    which is folded with each prompt's number, so the other prompts change nothing.
    `stop` maps the new tokens of a sequence to how many of them to keep, or to None to
    go on; it is called every `chunk` tokens and at the end, for stop strings. The first
    token of `eos` ends a sequence and is not returned.

    Args:
      engine: of the model.
      batch: rows of a batch; more prompts take several batches.
      eos: tokens that end a sequence.
      pad: token for padding; any token of the vocabulary.
      bucket: prompts are padded to a multiple of this.
      chunk: new tokens between two calls of `stop`.
      rule: how a token is chosen.

    Raises:
      ValueError: a prompt is empty, or with `max_tokens` more too long for the cache
        (padded) or the model; or sampling without a key.
    """
    prefill = jax.jit(_prefill(engine))
    proceed = jax.jit(_proceed(engine, tuple(eos), pad, rule))

    def generate(
        state: State,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        key: jax.Array | None = None,
        stop: Callable[[Tokens], int | None] | None = None,
    ) -> list[Tokens]:
        if key is None and rule.temperature:
            raise ValueError("sampling needs a key: give generate jax.random.key(0)")
        key = jax.random.key(0) if key is None else key
        results: list[Tokens] = []
        for first in range(0, len(prompts), batch):
            group = prompts[first : first + batch]
            tokens, real = padded(engine, group, batch, bucket, pad, max_tokens)
            number = jnp.arange(first, first + batch)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number)
            done = np.arange(batch) >= len(group)
            now = prefill(state, tokens, real, keys, done)
            results += _run(proceed, state, now, len(group), max_tokens, chunk, stop)
        return results

    return generate


def padded(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    batch: int,
    bucket: int,
    pad: int,
    max_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as int `[batch, time]`, padded on the left, and which are real.

    Raises:
      ValueError: see `make_generate`.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ValueError(f"prompt {lengths.index(0)} is empty: give at least one token")
    time = -(-max(lengths) // bucket) * bucket
    grows = time if engine.start is None else 1
    if grows + max_tokens > engine.slots:
        raise ValueError(
            f"{grows} tokens (prompts of up to {max(lengths)}, in buckets of {bucket}) "
            f"and max_tokens={max_tokens} overflow a cache of {engine.slots} slots"
        )
    most = max(lengths) + max_tokens
    if engine.limit is not None and most > engine.limit:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and max_tokens={max_tokens}: the model "
            f"reads at most {engine.limit} tokens"
        )
    tokens = np.full((batch, time), pad, np.int32)
    real = np.zeros((batch, time), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, time - len(prompt) :] = prompt
        real[row, time - len(prompt) :] = True
    real[len(prompts) :, -1] = True  # unused rows still need a token to see
    return tokens, real


def _prefill(engine: Engine) -> Callable[..., Progress]:
    def prefill(
        state: State, tokens: jax.Array, real: jax.Array, keys: Any, done: Any
    ) -> Progress:
        logits, cache = engine.prefill(*state, tokens, real)
        history, known = started(engine, tokens, real)
        index = jnp.int32(tokens.shape[1] if engine.start is None else 1)
        return Progress(cache, logits, history, known, index, keys, jnp.int32(0), done)

    return prefill


def started(
    engine: Engine, tokens: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens by slot, `[batch, slots]`, and which are real."""
    if engine.start is not None:
        tokens = jnp.full((len(tokens), 1), engine.start, jnp.int32)
        real = jnp.ones_like(tokens, bool)
    wide = ((0, 0), (0, engine.slots - tokens.shape[1]))
    return jnp.pad(tokens, wide), jnp.pad(real, wide)


def _proceed(
    engine: Engine, eos: tuple[int, ...], pad: int, rule: sampling.Rule
) -> Callable[..., Progress]:
    def add(state: State, now: Progress) -> Progress:
        draw = jax.vmap(jax.random.fold_in, (0, None))(now.keys, now.count)
        ban = rule.banned(now.history, now.real, now.index, now.logits.shape[-1])
        token = rule.choose(draw, jnp.where(ban, -jnp.inf, now.logits))
        token = jnp.where(now.done, pad, token).astype(jnp.int32)
        done = now.done | jnp.isin(token, jnp.array(eos, jnp.int32))
        logits, cache = engine.step(*state, token[:, None], now.cache)
        here = (0, now.index)
        return Progress(
            cache,
            logits,
            jax.lax.dynamic_update_slice(now.history, token[:, None], here),
            jax.lax.dynamic_update_slice(now.real, ~now.done[:, None], here),
            now.index + 1,
            now.keys,
            now.count + 1,
            done,
        )

    def proceed(state: State, now: Progress, until: jax.Array) -> Progress:
        def more(now: Progress) -> jax.Array:
            return (now.count < until) & ~jnp.all(now.done)

        return jax.lax.while_loop(more, lambda now: add(state, now), now)

    return proceed


def _run(
    proceed: Callable[..., Progress],
    state: State,
    now: Progress,
    rows: int,
    max_tokens: int,
    chunk: int,
    stop: Callable[[Tokens], int | None] | None,
) -> list[Tokens]:
    """Adds tokens until every sequence has ended."""
    begin, kept = int(now.index), dict[int, Tokens]()
    while True:
        until = max_tokens if stop is None else min(max_tokens, int(now.count) + chunk)
        now = proceed(state, now, jnp.int32(until))
        found = list(_new(now, begin, rows))
        if stop is not None:
            for row, tokens in enumerate(found):
                cut = stop(tokens) if row not in kept else None
                if cut is not None:
                    kept[row] = tokens[:cut]
            done = sharding.fetch(now.done) | np.isin(
                np.arange(len(now.done)), list(kept)
            )
            now = now._replace(done=jnp.asarray(done))
        if int(now.count) >= max_tokens or bool(now.done.all()):
            return [kept.get(row, tokens) for row, tokens in enumerate(found)]


def _new(now: Progress, begin: int, rows: int) -> Iterator[Tokens]:
    """The new tokens of every sequence, without the last one if the sequence ended."""
    history, real = sharding.fetch(now.history), sharding.fetch(now.real)
    done, end = sharding.fetch(now.done), begin + int(now.count)
    for row in range(rows):
        tokens = history[row, begin:end][real[row, begin:end]].tolist()
        yield tokens[:-1] if done[row] else tokens
