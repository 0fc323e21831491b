"""What does AdaLoRA's pull to orthonormality cost, and which form costs least?

    python -m experiments.studies.orthogonality --study_dir=docs/results/orthogonality

P diag(lam) Q against LoRA at equal rank without pruning, so that the two differ only in
the parametrisation and the penalty. The student is x <- x + tanh(x W_k) over four
kernels 48 x 48; the teacher's kernels differ by an update of full rank whose singular
values decay by a factor of 0.8, or by its first four ("low rank"); targets have noise.
Adam, adapters of rank 4, 64 examples per step. The score is the noiseless error on
fresh inputs, relative to the start. The tables also have the mean of |p^T p - I| and
|q q^T - I| (Frobenius norms), and s_4 / s_1, the smallest over the largest singular
value of an update, in the kernel where it is least: near zero, the adapter has spent a
triplet on a direction that other triplets already have.

Every arm has its own learning rate in every setting: four, a factor 2 apart, and up to
three more while the best lies at the edge, on four seeds; twelve other seeds are
reported, each paired with LoRA on the same seed. Every rate is a line of `runs.jsonl`,
so an interrupted study resumes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import lorax
from experiments import paired
from experiments.machine import disk, tables
from experiments.studies.method import comparison
from lorax import _lapack, optim
from lorax.adapters import adalora

_MINUTES = flags.DEFINE_float("orthogonality_minutes", None, "Time limit in minutes.")

WIDTH, DEPTH, BATCH, HELD_OUT, RANK, NOISE = 48, 4, 64, 512, 4, 0.1
Adapter = Literal["lora", "adalora"]
GRID = (0.005, 0.01, 0.02, 0.04)
CHOOSE, REPORT = tuple(range(100, 104)), tuple(range(12))


class Setting(NamedTuple):
    """What all arms share.

    Attributes:
      steps: of a run.
      low_rank: whether the teacher's change has the adapters' rank.
      falls: whether the rate decays linearly to zero.
    """

    steps: int
    low_rank: bool = False
    falls: bool = False


class Arm(NamedTuple):
    """How an arm differs from AdaLoRA without a penalty; "lora" is LoRA.

    Attributes:
      adapter: "lora" or "adalora".
      form: of the penalty.
      weight: of the penalty.
      std: of p and q at the start; None for the init's 0.02, 0 for orthonormal ones.
      lam_rate: lam's learning rate over that of p and q.
    """

    adapter: Adapter = "adalora"
    form: Any = "decoupled"
    weight: float = 0.0
    std: float | None = None
    lam_rate: float = 1.0


# A mean over the four matrices of 4 x 0.1 is the paper's sum of 0.1 each.
PENALTIES = {
    "LoRA": Arm("lora"),
    "squared, a sum of 0.1": Arm(form="squared", weight=0.1 * DEPTH),
    "squared 0.001": Arm(form="squared", weight=0.001),
    "norm 0.1 (released)": Arm(form="norm", weight=0.1),
    "decoupled 1": Arm(weight=1.0),
    "decoupled 0.3": Arm(weight=0.3),
    "decoupled 0.1": Arm(weight=0.1),
    "none": Arm(),
}
ABLATIONS = {
    "LoRA": Arm("lora"),
    "none": Arm(),
    "none, std 1/sqrt(in)": Arm(std=WIDTH**-0.5),
    "none, orthonormal start": Arm(std=0.0),
    "none, rate of lam x 4": Arm(lam_rate=4.0),
    "none, rate of lam / 4": Arm(lam_rate=0.25),
    "decoupled 0.3, rate of lam x 4": Arm(weight=0.3, lam_rate=4.0),
}
SETTINGS = {
    "90 steps": (Setting(90), PENALTIES),
    "400 steps": (Setting(400), PENALTIES | ABLATIONS),
    "400 steps, the rate falls": (Setting(400, falls=True), PENALTIES | ABLATIONS),
    "400 steps, a teacher of low rank": (Setting(400, low_rank=True), ABLATIONS),
}
"""Name -> (what the arms share, the arms)."""


def teacher(key: jax.Array, values: Any) -> tuple[dict, dict]:
    """Returns frozen kernels, and those to learn, from the change's singular values."""
    base, goal = {}, {}
    for k in range(DEPTH):
        keys = jax.random.split(jax.random.fold_in(key, k), 3)
        draw = [jax.random.normal(own, (WIDTH, WIDTH)) for own in keys]
        base[f"k{k}"] = draw[0] / math.sqrt(WIDTH)
        left, right = (_lapack.qr(own)[0] for own in draw[1:])
        goal[f"k{k}"] = base[f"k{k}"] + (left * values) @ right.T
    return base, goal


def network(params: Any, x: jax.Array) -> jax.Array:
    """Four residual layers."""
    for k in range(DEPTH):
        x = x + jnp.tanh(x @ params[f"k{k}"])
    return x


class Numbers(NamedTuple):
    """Values that may be traced, so that arms with the same form share a program.

    Attributes:
      rate: the peak.
      steps: of the run.
      falls: whether the rate decays linearly to zero.
      values: the singular values of the change to learn, `[WIDTH]`.
      weight: of the penalty.
      grown: scale of p and q at the start, over the init's.
      orthonormal: whether they start orthonormal instead.
      lam_rate: lam's learning rate over that of p and q.
    """

    rate: Any
    steps: Any
    falls: Any
    values: Any
    weight: Any
    grown: Any
    orthonormal: Any
    lam_rate: Any


def numbers(setting: Setting, arm: Arm, rate: float) -> Numbers:
    """Returns what a run takes besides its form."""
    values = 0.8 ** np.arange(WIDTH)
    values[RANK if setting.low_rank else WIDTH :] = 0
    grown = 1.0 if not arm.std else arm.std / adalora.STD
    return Numbers(
        rate,
        setting.steps,
        setting.falls,
        np.float32(values),
        arm.weight,
        grown,
        arm.std == 0,
        arm.lam_rate,
    )


@functools.cache
def make_run(adapter: Adapter, form: Any) -> Callable[..., Any]:
    """Returns `run(seeds, numbers) -> (error, distances of p and q, flatness)`."""
    return jax.jit(jax.vmap(functools.partial(_run, adapter, form), (0, None)))


def _run(adapter: Adapter, form: Any, seed: jax.Array, given: Numbers) -> Any:
    own = jax.random.split(jax.random.key(seed), 4)
    base, goal = teacher(own[0], given.values)

    def batch(step: Any) -> tuple[jax.Array, jax.Array]:
        inputs, noise = jax.random.split(jax.random.fold_in(own[1], step))
        x = jax.random.normal(inputs, (BATCH, WIDTH))
        return x, network(goal, x) + NOISE * jax.random.normal(noise, x.shape)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return jnp.mean((network(params, batch[0]) - batch[1]) ** 2)

    target = lorax.Target(".*", rank=RANK, alpha=RANK, adapter=adapter)
    adapters, params = lorax.init(own[2], base, [target])
    tx = optax.adam(lambda count: given.rate * (1 - given.falls * count / given.steps))
    if adapter == "adalora":
        adapters, tx = _started(given, adapters), _allocated(given, form, tx)
    gradient = jax.grad(lorax.adapt(loss_fn))

    def step(index: jax.Array, carry: Any) -> Any:
        adapters, state = carry
        grads = gradient(adapters, params, batch(index))
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    start = adapters, tx.init(adapters)
    adapters, _ = jax.lax.fori_loop(0, given.steps, step, start)
    x = jax.random.normal(own[3], (HELD_OUT, WIDTH))

    def error(params: Any) -> jax.Array:
        return jnp.mean((network(params, x) - network(goal, x)) ** 2)

    merged = lorax.merge(adapters, params)
    return error(merged) / error(params), *distances(adapters), flatness(merged, params)


def flatness(merged: Any, params: Any) -> jax.Array:
    """Returns the least s_4 / s_1 over kernels, of the update's singular values."""
    values = [_lapack.svd(merged[k] - params[k])[1] for k in params]
    return jnp.min(jnp.stack([s[RANK - 1] / s[0] for s in values]))


def distances(adapters: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Returns the means of |p^T p - I| and |q q^T - I|; zeros for LoRA."""
    found = [a for a in adapters.values() if {"p", "q"} <= set(a.roles)]
    if not found:
        return jnp.zeros(()), jnp.zeros(())

    def away(x: jax.Array) -> jax.Array:
        return jnp.linalg.norm(x.T @ x - jnp.eye(RANK))

    def mean(parts: Sequence[jax.Array]) -> jax.Array:
        return jnp.mean(jnp.stack(parts))

    return mean([away(a.p) for a in found]), mean([away(a.q.T) for a in found])


def _started(given: Numbers, adapters: Any) -> Any:
    """Returns the adapters with p and q at the arm's scale, or orthonormal."""

    def size(x: jax.Array) -> jax.Array:
        return jnp.where(given.orthonormal, _lapack.qr(x)[0], given.grown * x)

    return {k: a.replace(p=size(a.p), q=size(a.q.T).T) for k, a in adapters.items()}


def _allocated(given: Numbers, form: Any, adam: Any) -> Any:
    """Returns AdaLoRA around Adam, with a budget of all triplets."""

    def scaled(updates: Any, params: Any) -> Any:
        del params
        return {k: u.replace(lam=given.lam_rate * u.lam) for k, u in updates.items()}

    return optim.adalora(
        optax.chain(adam, optax.stateless(scaled)),
        target_budget=RANK * DEPTH,
        total_steps=max(setting.steps for setting, _ in SETTINGS.values()),
        initial_warmup=0,
        final_steps=0,
        orthogonal_form=form,
        orthogonal_weight=given.weight,
    )


def study(name: str, arm: str, runs: comparison.Runs) -> dict[str, Any]:
    """Makes an arm's missing runs, and returns its results.

    Args:
      name: of the setting.
      arm: one of its arms.
      runs: the runs so far.

    Returns:
      "rate", "grid" {rate: mean error on the choosing seeds}, "final" by reported seed,
      "distance" [p, q], means over the reported seeds, and "flat" by seed.
    """
    setting, own = SETTINGS[name][0], SETTINGS[name][1][arm]
    run = make_run(own.adapter, own.form)
    grid: dict[str, float] = {}

    def line(part: str, seeds: Sequence[int], rate: float) -> dict[str, Any]:
        def made() -> dict[str, Any]:
            given = numbers(setting, own, rate)
            few = np.asarray(seeds).reshape(-1, len(CHOOSE))  # one compilation
            found = [np.stack(run(part, given), 1) for part in few]
            final, *away = np.concatenate(found).T
            *away, flat = away
            distance = [float(d.mean()) for d in away]
            return {"curve": final, "distance": distance, "flat": flat.tolist()}

        return runs.line((arm, name, part, rate), made)

    def score(rate: float) -> float:
        found = float(np.mean(line("choose", CHOOSE, rate)["curve"]))
        grid[f"{rate:.3g}"] = round(found, 5)
        return found

    rate = comparison.best_of_grid(score, GRID)
    best = line("report", REPORT, rate)
    return {
        "rate": rate,
        "grid": grid,
        "final": best["curve"],
        "distance": best["distance"],
        "flat": best["flat"],
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the markdown table of a setting."""
    header = ["arm", "rate", "error", "minus LoRA (95 %)", "on the choosing seeds"]
    rows = []
    for arm, own in found.items():
        final, lora = np.array(own["final"]), np.array(found["LoRA"]["final"])
        p, q = own["distance"]
        rows.append(
            [
                arm,
                f"{own['rate']:.3g}",
                f"{final.mean():.4f}",
                "-" if arm == "LoRA" else paired.difference(final - lora),
                f"{min(own['grid'].values()):.4f}",
                "-" if arm == "LoRA" else f"{p:.2f}, {q:.2f}",
                f"{np.mean(own['flat']):.3f}, {np.min(own['flat']):.3f}",
            ]
        )
    return tables.markdown(
        [*header, "distance of p, q", "s_4 / s_1: mean, least"], rows
    )


def digest(arm: Arm) -> str:
    """Returns a digest of what an arm's runs depend on, besides the setting."""
    sizes = WIDTH, DEPTH, BATCH, HELD_OUT, RANK, NOISE, CHOOSE, REPORT
    told = json.dumps([arm, sizes, {k: s for k, (s, _) in SETTINGS.items()}])
    return hashlib.sha256((told + jax.__version__).encode()).hexdigest()[:16]


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and writes the tables."""
    del argv
    folder = comparison.folder("orthogonality")
    digests = {arm: digest(own) for arm, own in (PENALTIES | ABLATIONS).items()}
    runs = comparison.Runs(folder / "runs.jsonl", digests, _MINUTES.value)
    results: dict[str, dict[str, Any]] = {}
    for name, (_, arms) in SETTINGS.items():
        for arm in arms:
            try:
                results.setdefault(name, {})[arm] = study(name, arm, runs)
            except comparison.NotRun as error:
                print(f"CUT SHORT, not run: {name}, {arm}: {error}")
    parts = [
        f"## {name}\n\n{table(found)}\n"
        for name, found in results.items()
        if "LoRA" in found
    ]
    disk.replace(folder / "table.md", "\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    app.run(main)
