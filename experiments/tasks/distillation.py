"""Distillation: a teacher instead of the text's own next tokens, for response tasks.

The teacher is another checkpoint with the same tokenizer. Its parameters are an
argument of the train step; its hidden states are computed once per batch, and its
logits with the student's, a few positions at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from experiments.data import tokenization
from experiments.generation import loading
from experiments.machine import placement
from experiments.tasks import losses as causal
from lorax import losses, training
from lorax.losses import Head, Predictions

NAME = "distillation"
"""The value of `config.run.loss`."""
ALL = 2**31 - 1
"""A chunk that holds every position."""


class Teacher(NamedTuple):
    """The last two fields of `tasks.Task`; both None without a teacher."""

    reference: training.Reference | None = None
    frozen: Any = None


def make(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    place: placement.Place = placement.ALONE,
) -> tuple[Callable[..., Any], Teacher]:
    """Returns the loss of `(params, batch, said)`, and the teacher.

    Raises:
      ValueError: the teacher's tokens are not the student's.
    """
    other, frozen = load(config.model, tokenizer, place)
    words, teachers = model.config.vocabulary, other.config.vocabulary
    if teachers < words:
        raise ValueError(
            f"config.model.teacher has {teachers} tokens and the student {words}: the "
            "teacher must know every token that the student can produce"
        )
    divergence = loss_of(config.run)

    like = other.head_of(frozen)._replace(kernel=None, bias=None)

    def reference(frozen: Any, params: Any, batch: Any) -> Any:
        del params
        head = other.head_of(frozen)
        return hidden_of(other, frozen, batch), head.kernel, head.bias

    def loss_fn(params: Any, batch: Any, said: Any) -> Any:
        hidden, kernel, bias = said
        head = narrowed(like._replace(kernel=kernel, bias=bias), words)
        own = Predictions(hidden_of(model, params, batch), model.head_of(params))
        found = divergence(own, Predictions(hidden, head), batch["weights"])
        return found.mean, {"weight": found.weight}

    return loss_fn, Teacher(reference, frozen)


def loss_of(run: ml_collections.ConfigDict) -> Callable[..., losses.Divergence]:
    """Returns the divergence with `run.loss_options`, after a try on one token.

    Raises:
      TypeError: an unknown option.
      ValueError: an option out of range.
    """
    chunk = {causal.AUTO: None, 0: ALL}.get(run.loss_chunk, run.loss_chunk)
    loss = functools.partial(
        losses.chunked_divergence, chunk=chunk, **dict(run.loss_options)
    )
    one = Predictions(jnp.ones((1, 1, 1)), jnp.ones((1, 2)))
    jax.eval_shape(loss, one, one, jnp.ones((1, 1)))
    return loss


def load(
    config: ml_collections.ConfigDict,
    tokenizer: tokenization.Tokenizer,
    place: placement.Place,
) -> tuple[Any, Any]:
    """Returns the teacher and its parameters, in the student's dtype and sharding.

    Raises:
      ValueError: its tokenizer is not the student's.
    """
    own = config.copy_and_resolve_references().unlock()
    own.source, own.random, own.quantize = config.teacher, {}, ""
    model, params, tokens = loading.load_base(own, jax.random.key(0), place)
    told = [(t.vocabulary, t.eos_id, t.encode(SAMPLE)) for t in (tokens, tokenizer)]
    if told[0] != told[1]:
        raise ValueError(
            f"config.model.teacher={config.teacher!r} has another tokenizer than the "
            "student: their next tokens can only be compared if both have the same "
            "one; give a teacher of the student's family"
        )
    return model, params


SAMPLE = "A teacher's tokens are 12 of 345, e.g. naïve—for (x) in range(7):\n\treturn"
"""A text that tokenizers of different families split differently."""


def hidden_of(model: Any, params: Any, batch: Any) -> jax.Array:
    """Returns the hidden states of a batch, which the model's head reads."""
    packed = {k: batch[k] for k in ("segments", "positions") if k in batch}
    return model.apply({"params": params}, batch["inputs"], hidden=True, **packed)


def narrowed(head: Head, words: int) -> Head:
    """Returns a head without the rows that pad its vocabulary beyond `words`."""
    if head.vocabulary == words:
        return head
    kernel = head.kernel[:words] if head.tied else head.kernel[:, :words]
    return head._replace(
        kernel=kernel, bias=None if head.bias is None else head.bias[:words]
    )
