"""Turns the values of a config into the objects that a run needs."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax

import lorax
from experiments.generation import decoder

METHODS = ("lora", "full")


def make_model(config: ml_collections.ConfigDict) -> decoder.Decoder:
    """Returns the decoder that `config.model` describes."""
    return decoder.Decoder(
        vocabulary=config.vocabulary,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        hidden=config.hidden,
    )


def make_loss(model: decoder.Decoder) -> Callable[..., Any]:
    """Returns `(params, batch) -> (mean cross-entropy in nats, {"weight": targets})`.

    It knows nothing of adapters: `lorax` transforms it as it is.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = model.apply({"params": params}, batch["inputs"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        weight = batch["weights"].sum()
        return (nll * batch["weights"]).sum() / weight, {"weight": weight}

    return loss_fn


def make_targets(method: str, config: ml_collections.ConfigDict) -> list[lorax.Target]:
    """Returns the targets that a method trains.

    Args:
      method: "lora" for low-rank factors and the leaves trained whole beside them;
        "full" for every leaf whole, with the same train step.
      config: `config.adapter`.
    """
    if method == "full":
        return [lorax.Target(".*", adapter="full")]
    if method != "lora":
        raise ValueError(f"run.methods: {method!r} is not one of {', '.join(METHODS)}")
    low_rank = [
        lorax.Target(
            pattern,
            rank=config.rank,
            alpha=config.alpha,
            adapter=config.adapter,
            scaling=config.scaling,
            init=config.init,
            dropout=config.dropout,
            options=config.options,
        )
        for pattern in config.patterns
    ]
    whole = [lorax.Target(p, adapter="full") for p in config.train_whole]
    return [*whole, *low_rank]
