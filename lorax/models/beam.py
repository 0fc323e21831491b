"""Beam search: the most probable continuation that K parallel guesses find.

Each step considers the 2 K best continuations (more, with several end tokens) of the
running guesses. Those of the first K that end are finished, with the score

    log p(new tokens, end token included) / (number of new tokens) ** length_penalty

and the K best that do not end run on. A search stops when its best running guess,
scored at its present length, cannot beat its worst finished one. This is the procedure
of transformers' `generate(num_beams=K, early_stopping=False)`, token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import sharding
from lorax.models import decoding, sampling
from lorax.models.decoding import Engine, State, Tokens

LOW = -1e9  # score of guesses that do not exist


class Search(NamedTuple):
    """All beams of a batch.

    Attributes:
      cache: of the engine, with `batch * beams` rows.
      logits: `[batch * beams, vocabulary]`.
      running: int `[batch, beams, slots]`, tokens by slot.
      scores: `[batch, beams]`, log-probabilities of the running ones.
      finished: int `[batch, beams, slots]`, the best ones first.
      lengths: int `[batch, beams]`, numbers of new tokens of the finished ones.
      best: `[batch, beams]`, scores of the finished ones.
      found: bool `[batch, beams]`, which of the finished ones exist.
      improvable: bool `[batch]`, False once the search is over.
      index: int32 []; slot of the next token.
      count: int32 []; new tokens so far.
    """

    cache: Any
    logits: jax.Array
    running: jax.Array
    scores: jax.Array
    finished: jax.Array
    lengths: jax.Array
    best: jax.Array
    found: jax.Array
    improvable: jax.Array
    index: jax.Array  # type: ignore[assignment]
    count: jax.Array  # type: ignore[assignment]


def make_search(
    engine: Engine,
    *,
    batch: int,
    beams: int,
    eos: Sequence[int],
    pad: int = 0,
    bucket: int = 64,
    length_penalty: float = 1.0,
    no_repeat: int = 0,
) -> Callable[..., list[Tokens]]:
    """Returns `search(state, prompts, max_tokens) -> the best new tokens of each`.

    Args:
      engine: of the model.
      batch: prompts at a time; the cache has `batch * beams` rows.
      beams: number of running guesses for each prompt.
      eos: tokens that end a sequence; they are not returned.
      pad: token for padding.
      bucket: prompts are padded to a multiple of this.
      length_penalty: exponent of the length; larger favours longer answers. 1 as in
        transformers; the LoRA paper's E2E runs use 0.8 (GPT-2 medium) and 0.9.
      no_repeat: see `sampling.Rule`.

    Raises:
      ValueError: no beams or no end token, or as in `decoding.make_generate`.
    """
    if beams < 1 or not eos:
        raise ValueError(f"beams={beams}, eos={list(eos)}; give at least one of each")
    rule = sampling.Rule(no_repeat=no_repeat)
    plan = _Plan(engine, beams, tuple(eos), length_penalty, rule)
    begin, run = jax.jit(_begin(plan)), jax.jit(_run(plan))

    def search(
        state: State, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> list[Tokens]:
        results: list[Tokens] = []
        for first in range(0, len(prompts), batch):
            group = prompts[first : first + batch]
            tokens, real = decoding.padded(
                engine, group, batch, bucket, pad, max_tokens
            )
            now, known = begin(state, tokens, real, np.arange(batch) < len(group))
            start = int(now.index)
            now = run(state, now, known, jnp.int32(max_tokens))
            best = sharding.fetch(now.finished)[:, 0]
            size = sharding.fetch(now.lengths)[:, 0]
            for row in range(len(group)):
                answer = best[row, start : start + size[row]].tolist()
                results.append(answer[:-1] if answer[-1] in eos else answer)
        return results

    return search


class _Plan(NamedTuple):
    """The options of a search; see `make_search`."""

    engine: Engine
    beams: int
    eos: tuple[int, ...]
    penalty: float
    rule: sampling.Rule


class _Guesses(NamedTuple):
    """The continuations under consideration, the best first.

    Attributes:
      sequences: int `[batch, guesses, slots]`.
      scores: `[batch, guesses]`, log-probabilities.
      beam: int `[batch, guesses]`, the running guess that each continues.
      ends: bool `[batch, guesses]`.
    """

    sequences: jax.Array
    scores: jax.Array
    beam: jax.Array
    ends: jax.Array


def _begin(plan: _Plan) -> Callable[..., tuple[Search, jax.Array]]:
    engine, beams = plan.engine, plan.beams

    def begin(
        state: State, tokens: jax.Array, real: jax.Array, asked: jax.Array
    ) -> tuple[Search, jax.Array]:
        logits, cache = engine.prefill(*state, tokens, real)
        history, known = decoding.started(engine, tokens, real)
        batch, index = len(tokens), tokens.shape[1] if engine.start is None else 1
        rows = jnp.repeat(jnp.arange(batch), beams)
        running = jnp.repeat(history[:, None], beams, axis=1)
        first = jnp.where(jnp.arange(beams) == 0, 0.0, LOW)  # all are equal so far
        none = jnp.full((batch, beams), LOW)
        return Search(
            cache.rows(rows),
            logits[rows],
            running,
            jnp.broadcast_to(first, (batch, beams)),
            running,
            jnp.zeros((batch, beams), jnp.int32),
            none,
            jnp.zeros((batch, beams), bool),
            asked,
            jnp.int32(index),
            jnp.int32(0),
        ), known[rows]

    return begin


def _run(plan: _Plan) -> Callable[..., Search]:
    """The whole search in one program."""

    def add(state: State, now: Search, known: jax.Array, most: jax.Array) -> Search:
        count = now.count + 1
        guesses = _guesses(plan, now, known, most)
        scores = jnp.where(guesses.ends, guesses.scores + LOW, guesses.scores)
        going, chosen = jax.lax.top_k(scores, plan.beams)
        running = _rows(guesses.sequences, chosen)
        finished, lengths, best, found = _finished(plan, now, guesses)

        worst = jnp.where(found, best.min(axis=1, keepdims=True), LOW)
        hope = going[:, :1] / count**plan.penalty
        improvable = now.improvable & jnp.any(hope > worst, axis=1)
        source = _rows(guesses.beam, chosen)
        rows = (jnp.arange(len(source))[:, None] * plan.beams + source).reshape(-1)
        last = jnp.take(running, now.index, axis=2).reshape(-1, 1)
        logits, cache = plan.engine.step(*state, last, now.cache.rows(rows))
        return Search(
            cache,
            logits,
            running,
            going,
            finished,
            lengths,
            best,
            found,
            improvable,
            now.index + 1,
            count,
        )

    def run(state: State, now: Search, known: jax.Array, most: jax.Array) -> Search:
        def body(carry: tuple[Search, jax.Array]) -> tuple[Search, jax.Array]:
            now, known = carry
            # every running guess has a token in this slot from now on
            new = jnp.ones((len(known), 1), bool)
            after = jax.lax.dynamic_update_slice(known, new, (0, now.index))
            return add(state, now, known, most), after

        def more(carry: tuple[Search, jax.Array]) -> jax.Array:
            return (carry[0].count < most) & jnp.any(carry[0].improvable)

        return jax.lax.while_loop(more, body, (now, known))[0]

    return run


def _guesses(plan: _Plan, now: Search, known: jax.Array, most: jax.Array) -> _Guesses:
    """The best continuations, by one token, of all running guesses."""
    batch, beams, slots = now.running.shape
    words = now.logits.shape[-1]
    logp = jax.nn.log_softmax(now.logits, axis=-1)
    flat = now.running.reshape(-1, slots)
    banned = plan.rule.banned(flat, known, now.index, words)
    logp = jnp.where(banned, -jnp.inf, logp)
    logp = logp.reshape(batch, beams, words) + now.scores[..., None]
    keep = max(2, 1 + len(plan.eos)) * beams
    scores, at = jax.lax.top_k(logp.reshape(batch, -1), keep)
    beam, token = at // words, (at % words).astype(jnp.int32)
    sequences = jax.lax.dynamic_update_slice(
        _rows(now.running, beam), token[..., None], (0, 0, now.index)
    )
    ends = jnp.isin(token, jnp.array(plan.eos, jnp.int32)) | (now.count + 1 >= most)
    return _Guesses(sequences, scores, beam, ends)


def _finished(plan: _Plan, now: Search, guesses: _Guesses) -> tuple[jax.Array, ...]:
    """`finished`, `lengths`, `best` and `found` of the search after one more token."""
    count = now.count + 1
    first = jnp.arange(guesses.ends.shape[1]) < plan.beams
    over = guesses.ends & first & now.improvable[:, None]
    done = jnp.where(over, guesses.scores / count**plan.penalty, LOW)
    best, order = jax.lax.top_k(jnp.concatenate([now.best, done], 1), plan.beams)

    def both(old: jax.Array, new: jax.Array) -> jax.Array:
        return _rows(jnp.concatenate([old, new], 1), order)

    size = jnp.broadcast_to(count, over.shape)
    return (
        both(now.finished, guesses.sequences),
        both(now.lengths, size),
        best,
        both(now.found, over),
    )


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[i, index[i, j]]` for `x: [batch, rows, ...]`."""
    wide = index.reshape(index.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, wide, axis=1)
