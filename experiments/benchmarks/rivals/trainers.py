"""Whole train steps to compare: lorax's, other JAX libraries', and PyTorch's.

Every trainer runs forward, backward and AdamW (rate 1e-3, decay 0.01, otherwise the
defaults that optax and torch share) on what it trains, and keeps its own state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import lorax
from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import programs
from experiments.benchmarks.rivals import torch_peft
from lorax import optim, training
from lorax.adapters import orthogonal_penalty

RATE, DECAY, BETA1 = 1e-3, 0.01, 0.9

Named = dict[tuple[str, str], Any]
"""Arrays by lorax's path and field, in lorax's orientation."""


class Trainer(NamedTuple):
    """A compiled train step."""

    step: Callable[[], float]  # makes a step; returns the loss before the update
    moments: Callable[[], Named]  # Adam's first moments: the gradients of step one
    build_seconds: float  # to trace and compile; for torch.compile, the first passes


def optimizer(method: str, adapters: Any, own_penalty: bool = False) -> Any:
    """Returns AdamW, for AdaLoRA with its allocation and penalty.

    Args:
      method: the case's.
      adapters: for their total rank.
      own_penalty: False: PEFT's penalty, 0.5 times the mean of the norms, by autodiff;
        True: lorax's default, a closed-form step after AdamW.
    """
    adamw = optax.adamw(RATE, weight_decay=DECAY)
    if method != "adalora":
        return adamw
    settings = torch_peft.ADALORA
    allocated = optim.adalora(
        adamw,
        target_budget=sum(a.rank // 2 for a in adapters.values()),
        total_steps=settings["total_step"],
        initial_warmup=settings["tinit"],
        final_steps=settings["tfinal"],
        interval=settings["deltaT"],
        orthogonal_weight=None if own_penalty else 0.0,
    )
    if own_penalty:
        return allocated
    slope = jax.grad(peft_penalty)

    def add(grads: Any, adapters: Any) -> Any:
        return jax.tree.map(jnp.add, grads, slope(adapters))

    return optax.chain(optax.stateless(add), allocated)


def peft_penalty(adapters: Any) -> jax.Array:
    """Returns AdaLoRA's penalty as PEFT adds it to the loss."""
    return torch_peft.PENALTY * orthogonal_penalty(adapters, "norm")


class Reference(NamedTuple):
    """The first step of a case in float64, from the definition of an adapted model."""

    loss: float
    gradients: Named


def reference(case: programs.Case, shape: gpt2.Shape, method: str) -> Reference:
    """Returns the loss of the merged model and its gradients, all in float64."""
    model = programs.loss_of(gpt2.Gpt2(shape))

    def merged(adapters: Any, params: Any, batch: Any) -> jax.Array:
        return model(lorax.merge(adapters, params), batch)

    def penalty(adapters: Any, params: Any, batch: Any) -> jax.Array:
        del params, batch
        return peft_penalty(adapters)

    loss, gradients = programs.in_float64(case._replace(loss=merged))
    if method == "adalora":
        _, more = programs.in_float64(case._replace(loss=penalty))
        gradients = jax.tree.map(np.add, gradients, more)
    return Reference(float(loss), named(gradients))


def named(adapters: Mapping[str, Any]) -> Named:
    """Returns the arrays of a tree of adapters."""
    return {
        (path, field): np.asarray(getattr(adapter, field))
        for path, adapter in adapters.items()
        for field in adapter.roles
    }


def whole(params: Any) -> Named:
    """Returns the arrays of a parameter tree, as `Full` adapters would hold them."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {(path, "value"): np.asarray(leaf) for path, leaf in flat.items()}


def of_lorax(
    case: programs.Case, shape: gpt2.Shape, method: str, own_penalty: bool = False
) -> Trainer:
    """Returns the step of `lorax.training`."""
    loss_fn = training.simple_loss(programs.loss_of(gpt2.Gpt2(shape)))
    tx = optimizer(method, case.trained, own_penalty)
    step = training.make_train_step(loss_fn, tx, on_merge="error")
    state = training.create_state(jax.random.key(0), case.trained, tx)

    def with_loss(state: Any, params: Any, batch: Any) -> Any:
        state, metrics = step(state, params, batch)
        return state, metrics["loss"]

    return _started(with_loss, state, case, lambda state: state.opt_state, named)


def of_loss(case: programs.Case, names: Callable[[Any], Named]) -> Trainer:
    """Returns a hand-written step around a loss.

    Args:
      case: what is trained, as its library keeps it.
      names: names the arrays of a tree like `case.trained`.
    """
    return _started(*plain(case), case, lambda state: state[1], names)


def plain(case: programs.Case) -> tuple[Callable[..., Any], Any]:
    """Puts AdamW around the gradients of a case.

    Returns:
      `step(state, params, batch) -> (state, loss)`, and the state, whose arrays are
      copies.
    """
    tx = optax.adamw(RATE, weight_decay=DECAY)
    gradients = case.step()

    def step(state: Any, params: Any, batch: Any) -> Any:
        trained, moments = state
        loss, grads = gradients(trained, params, batch)
        updates, moments = tx.update(grads, moments, trained)
        return (optax.apply_updates(trained, updates), moments), loss

    trained = jax.tree.map(jnp.copy, case.trained)
    return step, (trained, tx.init(trained))


def _started(
    step: Callable[..., Any],
    state: Any,
    case: programs.Case,
    moments_in: Callable[[Any], Any],
    names: Callable[[Any], Named],
) -> Trainer:
    """Compiles `(state, params, batch) -> (state, loss)`, with the state donated."""
    inputs = case.params, case.tokens
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, *inputs)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began

    def run() -> float:
        nonlocal state
        state, loss = compiled(state, *inputs)
        return float(jax.block_until_ready((state, loss))[1])

    def moments() -> Any:
        return names(optax.tree.get(moments_in(state), "mu"))

    return Trainer(run, moments, seconds)


def of_torch(
    case: programs.Case,
    shape: gpt2.Shape,
    method: str,
    device: str = "cpu",
    compiled: bool = False,
) -> Trainer:
    """Returns the loop of PEFT's documentation, with torch's fused AdamW.

    Args:
      case: from `programs.adapted`.
      shape: its sizes.
      method: its method.
      device: torch's name of the device.
      compiled: whether to run the model through `torch.compile`.
    """
    import torch

    model, trained = torch_peft.adapted(case, shape, method, device)
    run_model = torch.compile(model) if compiled else model
    tokens = torch.from_numpy(np.array(case.tokens)).long().to(device)
    tx = torch.optim.AdamW(trained.values(), RATE, weight_decay=DECAY, fused=True)
    count = 0

    def step() -> float:
        nonlocal count
        outputs = run_model(tokens)
        outputs.loss.backward()
        tx.step()
        count += 1
        if method == "adalora":
            model.update_and_allocate(count)
        tx.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        return outputs.task.item()

    seconds = 0.0
    if compiled:
        began = time.perf_counter()
        run_model(tokens).loss.backward()  # compiles both passes
        tx.zero_grad()
        seconds = time.perf_counter() - began

    def moments() -> Named:
        first = {name: tx.state[p]["exp_avg"] for name, p in trained.items()}
        return {
            (path, field): torch_peft.oriented(path, moment).float().cpu().numpy()
            for (path, field), moment in first.items()
        }

    return Trainer(step, moments, seconds)
