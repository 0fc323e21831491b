"""The best rate of one step of Adam without memory, at a point of a run.

The data are a few sentences, and batches are drawn from them with replacement: mean and
deviation of every parameter's gradient, and the loss, are known without error.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import lorax
from experiments.studies.method import trial
from experiments.studies.pretrained import arms, bases
from lorax import scaling

RATE, SEED = 10**-3, 1
"""Of the run to the point."""
ROWS, BEYOND = 16, 10_000
"""Batches of 16 sentences that are the data, and the number of the first."""
USUAL = 16
DRAWS, PROBES = 6, 2


class Cell(NamedTuple):
    """A step.

    Attributes:
      point: steps before it.
      batch: sentences.
      eps: in units of the root mean square of the gradient of USUAL sentences.
    """

    point: int
    batch: int
    eps: float


class Place(NamedTuple):
    """A point of a run, and what is known of the loss there.

    Attributes:
      theta: [n], LoRA's factors.
      loss: `theta -> []`, over all sentences.
      bend: `v -> H v`, of that loss.
      grads: [sentences, n], of each sentence.
    """

    theta: jax.Array
    loss: Callable[[jax.Array], float]
    bend: Callable[[jax.Array], jax.Array]
    grads: np.ndarray

    @property
    def noise_scale(self) -> float:
        """The simple noise scale, in sentences."""
        return float(self.grads.var(0).sum() / np.square(self.grads.mean(0)).sum())


def reach(setting: bases.Setting, steps: int) -> Place:
    """Trains for so many steps."""
    task = bases.TASKS["banking77"]
    fields = {"run.steps": 150, "optimizer.warmup_steps": 15}
    config = bases.configured(task, arms.Arm(fields, (RATE,), ""))
    start = trial.make_start(config, setting.loss_fn, setting.base, setting.train)
    prepared, batches = start(SEED, RATE), setting.train(SEED)
    state = prepared.state
    for i in range(steps):
        state, _ = prepared.step(state, prepared.params, batches[i])
    kept = {k: a for k, a in state.adapters.items() if a.replaces}
    moved = {k: a for k, a in state.adapters.items() if not a.replaces}
    data = [batches[BEYOND + i] for i in range(ROWS)]
    return place(setting.loss_fn, moved, (kept, prepared.params), data)


def place(
    loss_fn: Any, moved: Any, rest: tuple[Any, Any], data: Sequence[Any]
) -> Place:
    """Differentiates the loss at a point.

    Args:
      loss_fn: `(params, batch) -> (loss, metrics)`.
      moved: the adapters that the step moves.
      rest: the other adapters, and the base.
      data: batches of one size.
    """
    theta, unravel = ravel_pytree(moved)
    adapted = lorax.adapt(loss_fn)

    def loss(theta: jax.Array, rest: Any, batch: Any) -> jax.Array:
        kept, params = rest
        return adapted({**kept, **unravel(theta)}, params, batch)[0]

    gradient = jax.grad(loss)

    def of_rows(theta: jax.Array, rest: Any, batch: Any) -> jax.Array:
        rows = jax.tree.map(lambda x: x[:, None], batch)
        return jax.vmap(gradient, (None, None, 0))(theta, rest, rows)

    def bent(theta: jax.Array, rest: Any, batch: Any, v: jax.Array) -> jax.Array:
        return jax.jvp(lambda t: gradient(t, rest, batch), (theta,), (v,))[1]

    loss, of_rows, bent = jax.jit(loss), jax.jit(of_rows), jax.jit(bent)
    grads = np.concatenate([np.asarray(of_rows(theta, rest, own)) for own in data])
    return Place(
        theta,
        lambda theta: float(np.mean([loss(theta, rest, own) for own in data])),
        lambda v: jnp.mean(jnp.stack([bent(theta, rest, own, v) for own in data]), 0),
        grads,
    )


def measure(here: Place, cell: Cell, seed: int = SEED) -> dict[str, Any]:
    """Finds the best rate of a step, and what the law says of it.

    Returns:
      "rates": the rates tried, ascending; "losses": `[rates][draws]`, minus the loss
      before the step; "law": the rate per parameter; "slope": the mean of u . g, over
      what the law says; and the noise scale.
    """
    g, sigma = here.grads.mean(0), here.grads.std(0)
    size = math.sqrt(np.mean(np.square(g) + np.square(sigma) / USUAL))
    eps = cell.eps * size
    law = float(
        scaling.adam_epsilon_learning_rate(
            g,
            sigma,
            here.bend,
            cell.batch,
            eps,
            key=jax.random.key(0),
            probes=PROBES,
        )
    )
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(here.grads), size=(DRAWS, cell.batch))
    steps = [scaling.softsign(here.grads[own].mean(0), eps) for own in drawn]
    before = here.loss(here.theta)

    @functools.cache
    def losses(power: int) -> list[float]:
        rate = law * 2.0**power
        return [here.loss(here.theta - rate * u) - before for u in steps]

    best = lowest(lambda power: float(np.mean(losses(power))))
    mean = scaling.adam_epsilon_shrinkage(g, sigma, cell.batch, eps)
    slope = float(jnp.sum(mean * scaling.softsign(g, eps) * g))
    powers = range(best - 1, best + 2)
    return {
        "curve": [float(np.mean(losses(best)))],
        "rates": [law * 2.0**power for power in powers],
        "losses": [losses(power) for power in powers],
        "law": law,
        "slope": float(np.mean([u @ g for u in steps])) / slope,
        "noise_scale": here.noise_scale,
        "eps": eps,
    }


def lowest(score: Callable[[int], float]) -> int:
    """Walks from 0 to a whole number that is better than its neighbours."""
    best = 0
    while score(nearer := min((best - 1, best + 1), key=score)) < score(best):
        best = nearer
    return best


def optimum(rates: Sequence[float], losses: np.ndarray) -> float:
    """The vertex of a parabola through three rates, between the outer two."""
    x = np.array(rates) / rates[1]
    a, b, _ = np.polyfit(x, losses, 2)
    vertex = -b / (2 * a) if a > 0 else x[int(np.argmin(losses))]
    return float(rates[1] * np.clip(vertex, x[0], x[2]))


def octaves(line: Mapping[str, Any]) -> np.ndarray:
    """log2 of the best rate, as `[draws]` pseudo-values of the jackknife."""
    losses = np.array(line["losses"])
    draws = losses.shape[1]
    whole = np.log2(optimum(line["rates"], losses.mean(1)))
    left = [
        np.log2(optimum(line["rates"], np.delete(losses, i, 1).mean(1)))
        for i in range(draws)
    ]
    return draws * whole - (draws - 1) * np.array(left)
