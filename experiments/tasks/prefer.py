"""Preferences for a causal model: pairs of completions, or completions judged alone.

The reference is the model that training begins with: the same base with its adapters
off, or as initialised. Held-out pairs are scored as in TRL: rewards, how often the
chosen completion has the higher one (`rewards/accuracies`), and by how much
(`rewards/margins`).
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging

from experiments.data import batches, compared, examples, preferences, tokenization
from experiments.data.chat import templates
from experiments.data.sources import paths
from experiments.generation import loading, unmerged
from experiments.machine import placement
from experiments.tasks import base, losses
from experiments.tasks.base import Scores, Task
from lorax.losses import preferences as of
from lorax.losses.preferences import Completions, Pair

Tally = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum over rows, number of rows)."""


class Method(NamedTuple):
    """A preference loss.

    Attributes:
      loss: from `lorax.losses.preferences`; its options are `run.loss_options`.
      judge: `(loss with options, policy's completions, reference's completions, batch)
        -> tally`, with the losses under "loss".
      compares: whether it compares with a reference.
      pairs: whether rows are a chosen and a rejected completion; False: completions
        judged alone.
    """

    loss: Callable[..., Any]
    judge: Callable[..., Tally]
    compares: bool = True
    pairs: bool = True


def make_prefer(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    place: placement.Place = placement.ALONE,
) -> Task:
    """Returns the task of `config.data`, for a causal model."""
    data, lengths = config.data, config.data.lengths
    pad, method = tokenization.padding_id(tokenizer), METHODS[config.run.loss or "dpo"]
    found = encode(config, tokenizer, method)
    train, valid = found["train"].examples, found["valid"].examples
    judge = functools.partial(method.judge, loss_of(config.run))
    score = make_score(model, config.run.loss_chunk, method.pairs)

    def loss_fn(params: Any, batch: Any, said: Any = None) -> Any:
        tally = judge(score(params, batch), said, batch)
        total, weight = tally["loss"]
        told = _means({k: v for k, v in tally.items() if k != "loss"})
        return total / jnp.maximum(weight, 1), {**told, "weight": weight}

    @unmerged.either
    def scored(params: Any, batch: Any) -> Completions:
        return score(params, batch)

    def reference(frozen: Any, params: Any, batch: Any) -> Completions:
        return scored(unmerged.Unmerged(frozen, params), batch)

    @jax.jit
    def measured(policy: unmerged.Unmerged, batch: Any) -> Tally:
        said = scored(policy.at_start(), batch) if method.compares else None
        return judge(scored(policy, batch), said, batch)

    def scores(policy: unmerged.Unmerged, rows: int) -> Scores:
        judged, own = config.eval.batch_size, place.part(config.eval.batch_size)
        held_out = batches.evaluation_batches(
            valid[:rows], judged, lengths, pad, compared.collate, own
        )
        tallies = [measured(policy, place.put(batch)) for batch in held_out]
        told = _means(_summed(jax.device_get(tallies)))
        return {f"valid_{name}": float(value) for name, value in told.items()}

    def report(policy: unmerged.Unmerged, folder: pathlib.Path) -> Scores:
        del folder
        cut = {f"{split}_cut_short": own.truncated for split, own in found.items()}
        return scores(policy, base.asked(config.eval.final_rows, valid)) | cut

    return Task(
        batches.training_batches(
            train,
            data.batch_size,
            lengths,
            pad,
            config.run.seed,
            compared.collate,
            place.part(data.batch_size),
        ),
        loss_fn,
        lambda policy: scores(policy, base.asked(config.eval.rows, valid)),
        report,
        reference if method.compares else None,
    )


def loss_of(run: ml_collections.ConfigDict) -> Callable[..., Any]:
    """Returns the loss `run.loss` with its options, after a try on two rows.

    Raises:
      TypeError: an unknown option.
      ValueError: an option out of range.
    """
    method = METHODS[run.loss or "dpo"]
    loss = functools.partial(method.loss, **dict(run.loss_options))
    ones = jnp.ones((2, 2))
    rows = {"weights": ones[..., None], "desirable": ones[:, 0] > 0}
    own = Completions(-ones, ones)
    said = own if method.compares else None
    jax.eval_shape(functools.partial(method.judge, loss), own, said, rows)
    return loss


def encode(
    config: ml_collections.ConfigDict, tokenizer: tokenization.Tokenizer, method: Method
) -> dict[str, examples.Encoded]:
    """Encodes the rows of "train" and "valid" as tokens."""
    data = config.data

    def load() -> templates.ChatTemplate:
        return templates.load(loading.find(config.model.source), tokenizer)

    tokens = compared.Encoder(tokenizer, data.template, load)
    longest, made = max(data.lengths), {}
    for split, count in (("train", data.train_rows), ("valid", data.valid_rows)):
        path = paths.find(data[split])
        if method.pairs:
            rows = preferences.read_pairs(path).rows[: count or None]
            made[split] = compared.pairs(tokens, rows, longest, split)
        else:
            rows = preferences.read_judged(path).rows[: count or None]
            seed = config.run.seed
            made[split] = compared.judged(tokens, rows, longest, split, seed)
        if cut := made[split].truncated:
            logging.warning("%s: %d rows have a completion cut short", split, cut)
    return made


def make_score(
    model: Any, chunk: int, pairs: bool
) -> Callable[[Any, Any], Completions]:
    """Returns `(params, batch) -> completions of both sides`, `[rows, 2]`.

    Pairs are read as twice as many rows. For completions judged alone, the other side
    has no gradient: it is read separately, so that no backward pass goes through it.
    """

    def read(params: Any, batch: Any) -> Completions:
        found = losses.log_probs(model, params, batch, chunk)
        return of.completions(found, batch["weights"])

    def score(params: Any, batch: Any) -> Completions:
        names = ("inputs", "targets", "weights")
        if pairs:
            flat = {n: batch[n].reshape(-1, batch[n].shape[-1]) for n in names}
            return jax.tree.map(lambda x: x.reshape(-1, 2), read(params, flat))
        own, other = (
            read(params, {name: batch[name][:, i] for name in names}) for i in (0, 1)
        )
        other = jax.lax.stop_gradient(other)
        return jax.tree.map(lambda *x: jnp.stack(x, axis=1), own, other)

    return score


def _judge_pairs(loss: Any, policy: Completions, said: Any, batch: Any) -> Tally:
    """Tallies the rewards of pairs, each pair once."""
    own = _sides(policy)
    found = loss(Pair(*own)) if said is None else loss(Pair(*own), Pair(*_sides(said)))
    counts = _counts(batch)
    values = {
        "loss": found.loss,
        "rewards/chosen": found.chosen,
        "rewards/rejected": found.rejected,
        "rewards/accuracies": found.margin > 0,
        "logps/chosen": own[0].total,
        "logps/rejected": own[1].total,
    }
    return {k: (jnp.sum(counts * v), jnp.sum(counts)) for k, v in values.items()}


def _judge_alone(loss: Any, policy: Completions, said: Any, batch: Any) -> Tally:
    """Tallies the rewards of desirable rows, called chosen, and of the others."""
    (own, other), (own_said, other_said) = _sides(policy), _sides(said)
    counts, desirable = _counts(batch), batch["desirable"]
    baseline = of.kto_baseline(other, other_said, counts)
    values, rewards = loss(own, own_said, desirable, baseline)
    tally = {
        "loss": (jnp.sum(counts * values), jnp.sum(counts)),
        "kl": (baseline * jnp.sum(counts), jnp.sum(counts)),
    }
    for name, chosen in (("chosen", desirable), ("rejected", ~desirable)):
        kept = counts * chosen
        tally[f"rewards/{name}"] = jnp.sum(kept * rewards), jnp.sum(kept)
        tally[f"logps/{name}"] = jnp.sum(kept * own.total), jnp.sum(kept)
    return tally


METHODS: Mapping[str, Method] = {
    "dpo": Method(of.dpo, _judge_pairs),
    "ipo": Method(of.ipo, _judge_pairs),
    "orpo": Method(of.orpo, _judge_pairs, compares=False),
    "simpo": Method(of.simpo, _judge_pairs, compares=False),
    "kto": Method(of.kto, _judge_alone, pairs=False),
}
"""`config.run.loss` -> method; "" is "dpo"."""


def _sides(found: Completions) -> tuple[Completions, Completions]:
    """Splits `[rows, 2]` into the two sides."""
    first, second = (jax.tree.map(lambda x, i=i: x[:, i], found) for i in (0, 1))
    return first, second


def _counts(batch: Any) -> jax.Array:
    """Returns `[rows]`: 1, or 0 for rows that only fill up the batch."""
    return (batch["weights"].sum((1, 2)) > 0).astype(jnp.float32)


def _means(tally: Tally) -> dict[str, jax.Array]:
    """Returns the means of a tally, 0 for no rows, and the margin of mean rewards."""
    found = {k: total / jnp.maximum(count, 1) for k, (total, count) in tally.items()}
    margin = found["rewards/chosen"] - found["rewards/rejected"]
    return found | {"rewards/margins": margin}


def _summed(tallies: Sequence[Tally]) -> Tally:
    return jax.tree.map(lambda *parts: sum(parts), *tallies)
