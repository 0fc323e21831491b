"""The table of optimisers, one row each; test_common.py runs its tests on every row.

To add a method, append a Row. `make(**kwargs)` must give a complete optimiser, whose
updates are added to the adapters; a transformation without a learning rate is chained
with one here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from lorax import optim
from lorax.types import MicrobatchNorms
from tests.plugin import methods


class Row(NamedTuple):
    """An optimiser and what the tests may ask of it.

    Attributes:
      name: a unique name.
      make: factory of the optimiser.
      kwargs: its arguments, with a learning rate at which the regression's loss falls.
      adalora: True: it acts on AdaLora too; False: it must refuse one at `init`.
      decays: True: `make` takes `weight_decay`.
      static: arguments that `optax.inject_hyperparams` must not inject.
      needs_svd: True: its trees must contain an AdaLora.
      extra: extra arguments for every update.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    kwargs: dict[str, Any]
    adalora: bool = False
    decays: bool = True
    static: tuple[str, ...] = ()
    needs_svd: bool = False
    extra: dict[str, Any] = {}


def _pro(mode: str, learning_rate: float, **kwargs: Any) -> Row:
    kwargs = {"learning_rate": learning_rate, "mode": mode, **kwargs}
    return Row(f"lora_pro_{mode}", optim.lora_pro, kwargs)


def _spectral(learning_rate: Any, target: str) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(),
        optim.add_decayed_spectral_norm(0.01, target=target),
        optax.scale_by_learning_rate(learning_rate),
        optim.clip_spectral_norm(50.0),
    )


def _muon(factors: str, learning_rate: float) -> Row:
    kwargs = {"learning_rate": learning_rate, "factors": factors}
    return Row(f"muon_{factors}", optim.muon, kwargs)


def _adalora(
    learning_rate: Any,
    target_budget: int,
    total_steps: int,
    initial_warmup: int,
    final_steps: int,
    interval: int,
    importance: Any = "post",
    orthogonal_weight: Any = 0.1,
) -> optax.GradientTransformation:
    return optim.adalora(
        optax.adamw(learning_rate, weight_decay=0.0, mask=optim.decay_mask),
        target_budget=target_budget,
        total_steps=total_steps,
        initial_warmup=initial_warmup,
        final_steps=final_steps,
        interval=interval,
        importance=importance,
        orthogonal_weight=orthogonal_weight,
    )


def _adalora_row(name: str, **more: Any) -> Row:
    """All the tests' trees hold 6 triplets; the tests take at most 80 steps."""
    steps = {"total_steps": 80, "initial_warmup": 20, "final_steps": 20, "interval": 1}
    kwargs = {"learning_rate": 0.05, "target_budget": 5, **steps, **more}
    static = ("target_budget", "importance", *steps)
    return Row(name, _adalora, kwargs, True, False, static, needs_svd=True)


def _noise_scale(learning_rate: Any, decay: Any) -> optax.GradientTransformation:
    return optax.chain(optim.track_noise_scale(decay), optim.lora_plus(learning_rate))


NORMS = MicrobatchNorms(jnp.float32(3.0), jnp.float32(1.0), 2, 8)

ROWS = [
    Row(
        "lora_plus",
        optim.lora_plus,
        {"learning_rate": 0.02, "ratio": 4.0},
        adalora=True,
    ),
    Row(
        "lora_plus_auto",
        optim.lora_plus,
        {"learning_rate": 0.02, "ratio": "auto"},
        adalora=True,
    ),
    _pro("factor", 0.05),
    _pro("sgd", 0.3),
    _pro("rowcol", 0.05),
    _pro("full", 0.05),
    Row("riemannian", optim.riemannian, {"learning_rate": 0.05}),
    Row("riemannion", optim.riemannion, {"learning_rate": 0.1}),
    Row("reflora", optim.reflora, {"learning_rate": 0.05}),
    Row("lora_rite", optim.lora_rite, {"learning_rate": 0.05}, static=("escape",)),
    _muon("b", 0.02),
    _muon("both", 0.02),
    _muon("whitened", 0.1),
    _muon("split", 0.3),
    _muon("product", 0.1),
    Row(
        "spectral_delta",
        _spectral,
        {"learning_rate": 0.02, "target": "delta"},
        decays=False,
    ),
    Row(
        "spectral_factors",
        _spectral,
        {"learning_rate": 0.02, "target": "factors"},
        decays=False,
    ),
    Row("lora_fa", optim.lora_fa, {"learning_rate": 0.05}),
    _adalora_row("adalora_post"),
    _adalora_row("adalora_pre", importance="pre"),
    _adalora_row("adalora_free", orthogonal_weight=0.0),
    # from a package of its own, tests/plugin
    Row("signum", methods.signum, {"learning_rate": 0.02}, adalora=True, decays=False),
    Row(
        "noise_scale",
        _noise_scale,
        {"learning_rate": 0.02, "decay": 0.9},
        adalora=True,
        decays=False,
        extra={"microbatch": NORMS},
    ),
]
