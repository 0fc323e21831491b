"""LoRA+: how does the best ratio of b's learning rate to a's grow with the width?

    python -m experiments.studies.claims.width_exponent

The exact limit: for a square kernel n x n, adapters a: [n, 4] and b: [4, n] from LoRA's
init (a uniform with entries of order 1/sqrt(n), b = 0) learn a change of rank 4. The
loss is the expected squared error over inputs x, without sampling:

    few inputs    x of 8 dimensions, every output moves by order 1
    wide          x isotropic, every output moves by order 1
    fixed norm    x isotropic, the change's singular values are of order 1, so an output
                  moves by order 1 / sqrt(n)

Entries of x are of order 1 in all of them. For sign-like steps, the predicted exponents
are 1, 1/2 and 0: b's entries must move by 1, 1 and 1/sqrt(n); a's need 1/n if their
steps add up along few inputs, and 1/sqrt(n) if the change's directions are generic. The
first is the paper's limit (a = 1/n, b = 1), the second Su's sqrt(n / r).

Each ratio is tried at every product of the two rates, both in steps of a factor 2, and
scored by its lowest error after 30 steps of Adam with rates that decay linearly to
zero. From this profile two ratios are read for every seed: the best one, and the
largest one whose error is within a factor 2 of the best, interpolated. The exponent is
the slope of their logarithm against that of n, over seven widths from 64 to 4,096, with
one value per seed.

Decided before the run, after trials at two widths had shown errors to be flat below an
edge: the 95 % interval must be within +-0.1 of the mean, and an exponent e of 0, 1/2 or
1 is accepted if the interval lies in [e - 1/4, e + 1/4].
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import lorax
from experiments import paired
from experiments.machine import tables
from experiments.studies.method import comparison, panels, scorecard
from lorax import _lapack, optim

_MINUTES = flags.DEFINE_float("width_minutes", None, "Time limit for new runs.")

RANK, INPUTS, STEPS = 4, 8, 30
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
SEEDS = tuple(range(8))
REGIMES = {"few inputs": 1.0, "wide": 0.5, "fixed norm": 0.0}
"""Regime -> the predicted exponent."""
RATIOS = tuple(range(-6, 16))
PRODUCTS = tuple(range(-22, 1))
"""Logarithms to base 2."""
WITHIN = 2.0
KINDS = {"best": "best", "largest": "largest good"}
CLAIMED = (
    ("The best ratio of LoRA+ grows as the width n", "2402.12354", 1.0),
    ("The best ratio grows as sqrt(n / r)", "https://kexue.fm/archives/10001", 0.5),
)
"""(what is claimed, where, the exponent)."""

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def problem(regime: str, n: int, key: jax.Array) -> Loss:
    """Returns `(a, b) -> expected squared error, relative to no change`."""
    keys = jax.random.split(key, 3)
    if regime == "few inputs":
        span = jax.random.normal(keys[0], (INPUTS, n)) / math.sqrt(INPUTS)
        left = jax.random.normal(keys[1], (INPUTS, RANK))
        goal = left @ jax.random.normal(keys[2], (RANK, n))
        goal /= math.sqrt(INPUTS * RANK)

        def of_few(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.sum((span @ a @ b - goal) ** 2) / jnp.sum(goal**2)

        return of_few
    u = _lapack.qr(jax.random.normal(keys[0], (n, RANK)))[0]
    v = jax.random.normal(keys[1], (RANK, n)) / math.sqrt(RANK)
    if regime == "fixed norm":
        v *= math.sqrt(RANK / n)

    def of_all(a: jax.Array, b: jax.Array) -> jax.Array:
        """|a b - u v|^2 / |u v|^2 by r x r products; u has orthonormal columns."""
        own, both = jnp.sum((a.T @ a) * (b @ b.T)), jnp.sum((u.T @ a) * (v @ b.T))
        return 1 + (own - 2 * both) / jnp.sum(v**2)

    return of_all


@functools.partial(jax.jit, static_argnums=(0, 1))
def profile(regime: str, n: int, seed: jax.Array) -> jax.Array:
    """Returns log2 of the least error of every ratio, `[ratios]`."""
    goal, start = jax.random.split(jax.random.key(seed))
    loss = problem(regime, n, goal)
    a = jax.random.uniform(start, (n, RANK), minval=-1, maxval=1) / math.sqrt(n)
    b = jnp.zeros((RANK, n))
    adapters = {"w": lorax.Lora(a, b, 1.0, lorax.Axes((0,), (1,)))}

    def loss_of(adapters: Any) -> jax.Array:
        return loss(adapters["w"].a, adapters["w"].b)

    def error(ratio: jax.Array, product: jax.Array) -> jax.Array:
        rate = 2.0 ** ((product - ratio) / 2)
        falling = optax.linear_schedule(rate, 0.0, STEPS)
        # Gradients shrink with the width: eps must not make a difference.
        tx = optim.lora_plus(falling, 2.0**ratio, eps=1e-20)

        def step(carry: Any, _: Any) -> Any:
            adapters, state = carry
            updates, state = tx.update(jax.grad(loss_of)(adapters), state, adapters)
            return (optax.apply_updates(adapters, updates), state), None

        start = adapters, tx.init(adapters)
        (after, _), _ = jax.lax.scan(step, start, length=STEPS)
        found = loss_of(after)
        return jnp.where(jnp.isfinite(found), jnp.log2(jnp.maximum(found, 1e-6)), 99)

    every = jax.vmap(jax.vmap(error, (None, 0)), (0, None))
    return jnp.min(every(jnp.asarray(RATIOS), jnp.asarray(PRODUCTS)), axis=1)


def largest(values: np.ndarray) -> float:
    """Returns log2 of the largest ratio within a factor WITHIN of the best error.

    Args:
      values: `[ratios]`, as `profile` returns them.

    Raises:
      ValueError: even the largest ratio that was tried is within it.
    """
    limit = values.min() + math.log2(WITHIN)
    last = int(np.flatnonzero(values <= limit)[-1])
    if last == len(values) - 1:
        raise ValueError(f"ratio 2^{RATIOS[-1]} is still good: widen RATIOS")
    share = (limit - values[last]) / (values[last + 1] - values[last])
    return RATIOS[last] + float(share) * (RATIOS[last + 1] - RATIOS[last])


def slopes(logs: np.ndarray) -> np.ndarray:
    """Returns the width exponents, one per seed, of `logs: [widths, seeds]`."""
    return np.polyfit(np.log2(WIDTHS), logs, 1)[0]


def study(regime: str, runs: comparison.Runs) -> dict[str, Any]:
    """Makes a regime's missing runs, and returns its results.

    Returns:
      "profiles" [width][ratio], means over seeds; "best" and "largest" [width][seed],
      as log2; "exponents" of the two, by seed; and "equal" [width][seed], log2 of equal
      rates' error over the best.
    """
    profiles = []
    for n in WIDTHS:

        def made(n: int = n) -> dict[str, Any]:
            found = np.array([profile(regime, n, seed) for seed in SEEDS], float)
            return {"curve": found.min(1), "profile": found.round(4).tolist()}

        profiles.append(runs.line((regime, n), made)["profile"])
    every = np.array(profiles)
    best = np.array(RATIOS, float)[every.argmin(-1)]
    edge = np.array([[largest(seed) for seed in width] for width in every])
    return {
        "profiles": every.mean(1).round(4).tolist(),
        "best": best.tolist(),
        "largest": edge.tolist(),
        "exponents": {
            "best": slopes(best).tolist(),
            "largest": slopes(edge).tolist(),
        },
        "equal": (every[..., RATIOS.index(0)] - every.min(-1)).tolist(),
    }


def digest(regime: str) -> str:
    """Returns a digest of what a regime's runs depend on."""
    told = regime, RANK, INPUTS, STEPS, SEEDS, RATIOS, PRODUCTS, jax.__version__
    return comparison.digest(*told)


def page(found: Mapping[str, Any]) -> str:
    """Returns the tables of exponents, and of ratios by width."""
    header = ["inputs and change", "predicted", "exponent of the best ratio"]
    header += ["of the largest good one", "equal rates' error over the best, n = 4096"]
    rows, widths = [], []
    for regime, own in found["regimes"].items():
        best, edge = (np.array(own["exponents"][k]) for k in KINDS)
        cost = 2 ** np.mean(own["equal"][-1])
        told = [paired.difference(values, 2) for values in (best, edge)]
        rows.append([regime, f"{REGIMES[regime]:g}", *told, f"{cost:.2f}"])
        for name in KINDS:
            means = 2 ** np.mean(own[name], 1)
            widths.append(
                [f"{regime}, {KINDS[name]}", *(f"{mean:.3g}" for mean in means)]
            )
    sizes = ["ratio, geometric mean over seeds", *(f"n = {n}" for n in WIDTHS)]
    parts = [tables.markdown(header, rows), tables.markdown(sizes, widths)]
    cost = f"{found['cpu_seconds']} CPU-seconds.\n"
    return "\n\n".join([comparison.heading(__doc__, "figure.png"), *parts, cost])


def claims(found: Mapping[str, Any]) -> list[scorecard.Claim]:
    """Returns the paper's exponent 1 and Su's 1/2, with what each regime found."""
    rows = []
    for (claimed, source, exponent), kind in itertools.product(CLAIMED, KINDS):
        for regime, own in found["regimes"].items():
            number = f"exponent of the {KINDS[kind]} ratio; exact model, {regime}"
            values, around = own["exponents"][kind], (exponent - 0.25, exponent + 0.25)
            rows.append(scorecard.Claim(claimed, source, number, values, *around))
    return rows


def draw(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the mean profiles, with a panel per regime and a line per width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4.2 * len(REGIMES), 4.0)
    figure, axes = plt.subplots(1, len(REGIMES), figsize=size, layout="constrained")
    for axis, (regime, own) in zip(axes, found["regimes"].items(), strict=True):
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(WIDTHS)))
        for n, shade, values in zip(WIDTHS, shades, own["profiles"], strict=True):
            axis.plot(RATIOS, values, color=shade, label=f"n = {n}")
        axis.set(title=regime, xlabel="log2 of lr of b / lr of a")
        axis.set(ylabel="log2 of the relative error")
        axis.legend()
        panels.tidy(axis, columns=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and writes results, tables and figure."""
    del argv
    folder = comparison.folder("width_exponent")
    digests = {regime: digest(regime) for regime in REGIMES}
    runs = comparison.Runs(folder / "runs.jsonl", digests, _MINUTES.value)
    regimes = {regime: study(regime, runs) for regime in REGIMES}
    seconds = sum(line["cpu_seconds"] for line in runs.lines.values())
    found = {"regimes": regimes, "cpu_seconds": round(seconds)}
    comparison.publish(folder, found, page)
    draw(found, folder / "figure.png")


if __name__ == "__main__":
    app.run(main)
