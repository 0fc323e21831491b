"""Turns the values of a config into the objects that a run needs."""

import re
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax
import optax.contrib

import lorax
from experiments import decoder

METHODS = ("lora", "full")


def make_model(config: ml_collections.ConfigDict) -> decoder.Decoder:
    """The decoder that `config.model` describes."""
    return decoder.Decoder(
        vocabulary=config.vocabulary,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        hidden=config.hidden,
    )


def make_loss(model: decoder.Decoder) -> Callable[..., Any]:
    """Cross-entropy as `(params, batch) -> (mean nats a target, {"weight": targets})`.

    Nothing in it knows of adapters: `lorax` transforms it as it is.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = model.apply({"params": params}, batch["inputs"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        weight = batch["weights"].sum()
        return (nll * batch["weights"]).sum() / weight, {"weight": weight}

    return loss_fn


def make_targets(method: str, config: ml_collections.ConfigDict) -> list[lorax.Target]:
    """What trains under a method.

    Args:
      method: "lora" for low-rank factors and the leaves trained whole beside them;
        "full" for every leaf whole, by the same train step.
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


def make_optimizer(
    learning_rate: float, steps: int, config: ml_collections.ConfigDict
) -> optax.GradientTransformation:
    """AdamW or Muon under linear warm-up and cosine decay to `final_share` of the peak.

    Clipping by global norm is the train step's.

    Args:
      learning_rate: the peak; under `optax.inject_hyperparams` a traced number.
      steps: length of the schedule.
      config: `config.optimizer`, or `config.model.pretrain`; Muon also reads
        `adam_learning_rate`, the peak for what is no matrix of a layer.
    """
    warmup = min(config.warmup_steps, steps // 2)
    unit = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, warmup, steps, config.final_share
    )
    schedule = lambda peak: lambda step: peak * unit(step)  # the peak may be traced

    if config.name == "adamw":
        return optax.adamw(
            schedule(learning_rate),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_decayed,
        )
    if config.name == "muon":
        return optax.contrib.muon(
            schedule(learning_rate),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=schedule(config.adam_learning_rate),
            muon_weight_dimension_numbers=_layer_matrices,
        )
    raise ValueError(f"optimizer {config.name!r} is not one of adamw, muon")


def _decayed(adapters: dict[str, Any]) -> dict[str, Any]:
    """Which leaves weight decay acts on: all but norms and biases trained whole."""
    return {
        path: jax.tree.map(
            lambda _, path=path: not path.endswith(("/scale", "/bias")), adapter
        )
        for path, adapter in adapters.items()
    }


def _layer_matrices(adapters: dict[str, Any]) -> dict[str, Any]:
    """Which leaves Muon orthogonalises: the stacked kernels `[layers, in, out]`.

    Embedding, head and norms are Adam's, as Muon's author advises.
    """
    return {
        path: jax.tree.map(
            lambda _, path=path: (
                optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
                if re.fullmatch("layers/.*/kernel", path)
                else None
            ),
            adapter,
        )
        for path, adapter in adapters.items()
    }
