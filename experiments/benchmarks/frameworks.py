r"""A whole train step of lorax beside PEFT + PyTorch, `flax.nnx.LoRA` and qwix.

    python -m experiments.benchmarks.frameworks --profile --out=frameworks.json

Forward, backward and AdamW update of a GPT-2-shaped model, with the same weights,
factors and batch, interleaved in one run on the same pinned cores. Prints a markdown
table with a row for each method and program; `--profile` prints another one of where
the time goes. Before anything is timed, the programs must agree: loss and gradients of
the first step are compared with the same step in float64, and no program may be ten
times as far from it as the best one (`agreement`); for the losses of the next two
steps, the limit is ten times higher. Gradients are read from Adam's first moments, so
it is the timed programs that agree. Compilation has a column of its own.

In bfloat16 lorax and PEFT keep the adapters in float32; full fine-tuning trains
float32 master weights in lorax, and the bfloat16 weights themselves in torch.

Methods: LoRA, DoRA and AdaLoRA on the linears of the blocks, full fine-tuning of every
parameter, and "none", the same model with three biases trained, which shows how far the
frameworks themselves differ.

For AdaLoRA, these are equal: triplets, scale (PEFT divides by rank + 1e-5), the cubic
budget from r to r / 2 per matrix over 1,000 steps of which the last 100 are fixed, a
choice of triplets at *every* step (PEFT's default; lorax's is every tenth or rarer),
importance with both decays 0.85 after the update, and PEFT's penalty, 0.5 times the
mean of the norms. One thing differs: PEFT ranks by a threshold and drops all ties,
lorax drops one of them. The row "lorax, its own penalty" has the default of
`lorax.optim.adalora`, a closed-form step to orthonormality after AdamW; only the loss
of its first step is compared with the others.

lorax runs `lorax.training.make_train_step`, which also computes the gradients' norm and
skips non-finite steps; the other programs do neither. torch runs its fused AdamW and
fused attention; lorax, nnx and qwix run the attention of `gpt2_shaped`.

On a CPU, malloc keeps freed memory (`experiments.machine.memory`) for every program, as
in `experiments.main`; `--nokeep_memory` leaves malloc alone, and the profile counts the
page faults of either. On a GPU set `XLA_PYTHON_CLIENT_PREALLOCATE=false`, or jax takes
the memory that torch needs.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import app, flags

from experiments import paired
from experiments.benchmarks import adapt_cost
from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import programs
from experiments.benchmarks.rivals import (
    agreement,
    jax_rivals,
    profiles,
    torch_peft,
    trainers,
)
from experiments.machine import memory, tables, timing

# Beside those of adapt_cost: --layers, --width, --batch, --rounds, --threads, --out.
_METHODS = flags.DEFINE_list(
    "methods", ["lora", "dora", "adalora", "full", "none"], "Which to compare."
)
_COMPILE = flags.DEFINE_bool("compile", False, "Also add rows for torch.compile.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of frozen weights and activations."
)
_DEVICE = flags.DEFINE_enum(
    "device", "auto", ["auto", "cpu", "cuda"], "auto: cuda if torch and jax see it."
)
_KEEP = flags.DEFINE_bool("keep_memory", True, "On a CPU, keep freed memory.")
_PROFILE = flags.DEFINE_bool("profile", False, "Also show where the time goes.")

PACKAGES = ("jax", "flax", "optax", "torch", "peft", "qwix")


class Setting(NamedTuple):
    """How to run, beside the sizes."""

    dtype: str = "float32"
    device: str = "cpu"  # torch's name
    compiled: bool = False  # whether to add rows for torch.compile


class Contest(NamedTuple):
    """The programs of one method."""

    trainers: dict[str, trainers.Trainer]  # lorax first
    missing: dict[str, str]  # program -> why it is missing
    alike: dict[str, bool]  # False: gradients differ by design
    reference: trainers.Reference


def contest(method: str, shape: gpt2.Shape, setting: Setting) -> Contest:
    """Builds and compiles the programs of a method."""
    case = programs.adapted(shape, method, setting.dtype)
    made = {"lorax": trainers.of_lorax(case, shape, method)}
    missing, alike = {}, {}
    if method == "adalora":
        own = "lorax, its own penalty"
        made[own] = trainers.of_lorax(case, shape, method, own_penalty=True)
        alike[own] = False
    name = "PyTorch" if method in programs.WHOLE else "PEFT + PyTorch"
    for compiled in (False, True)[: 1 + setting.compiled]:
        row = name.replace("PyTorch", "torch.compile") if compiled else name
        if not torch_peft.available():
            missing[row] = "torch or peft is not installed"
            continue
        try:
            args = case, shape, method, setting.device, compiled
            made[row] = trainers.of_torch(*args)
        except Exception as error:  # torch.compile raises many classes
            if not compiled:
                raise
            missing[row] = _reason(error)
    if method == "full":
        loss = programs.loss_of(gpt2.Gpt2(shape))

        def by_hand(trained: Any, params: Any, batch: Any) -> Any:
            return loss(trained, batch)

        whole = case._replace(loss=by_hand, trained=case.params, params=())
        if setting.dtype == "float32":  # in bfloat16 it would train without a master
            made["JAX by hand"] = trainers.of_loss(whole, trainers.whole)
    if method == "lora":
        for row, build in jax_rivals.RIVALS.items():
            if setting.dtype != "float32":
                missing[row] = "compared in float32 only"
                continue
            try:
                rival = build(case, shape)
                made[row] = trainers.of_loss(rival.case, rival.names)
            except Exception as error:  # theirs may not fit this jax or flax
                missing[row] = _reason(error)
    return Contest(made, missing, alike, trainers.reference(case, shape, method))


def _reason(error: Exception) -> str:
    first = str(error).strip().split("\n")[0].replace("|", "/")
    return f"{type(error).__name__}: {first[:90]}"


def compare(
    method: str, shape: gpt2.Shape, setting: Setting, rounds: int
) -> dict[str, Any]:
    """Returns every program's agreement, build time and step time."""
    made = contest(method, shape, setting)
    errors = agreement.require(made.trainers, made.alike, made.reference, setting.dtype)
    steps = {name: trainer.step for name, trainer in made.trainers.items()}
    seconds = timing.interleave(steps, rounds)
    return {
        "deviation": max(errors.gradients.values()),  # from float64
        "errors": errors.gradients,
        "build_seconds": {n: t.build_seconds for n, t in made.trainers.items()},
        "seconds": seconds,
        "not_run": made.missing,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns markdown with a row per method and program; below 1, lorax is faster."""
    header = ["method, program", "build s", "best ms", "median ms", "range ms"]
    header += ["lorax / this, best", "paired, median", "paired, range"]
    rows = []
    for method, result in results.items():
        lorax = result["seconds"]["lorax"]
        for name, seconds in result["seconds"].items():
            ms = [1e3 * s for s in seconds]
            built = result["build_seconds"][name]
            ratios = paired.ratios(lorax, seconds)
            row = [f"{method}, {name}", f"{built:.1f}" if built else "-"]
            row += [f"{min(ms):.0f}", f"{statistics.median(ms):.0f}"]
            row += [f"{min(ms):.0f}-{max(ms):.0f}"]
            if name != "lorax":
                row += [f"{min(lorax) / min(seconds):.2f}"]
                row += [f"{statistics.median(ratios):.2f}"]
                row += [f"{min(ratios):.2f}-{max(ratios):.2f}"]
            rows.append(row + ["-"] * (len(header) - len(row)))
        for name, reason in result["not_run"].items():
            row = [f"{method}, {name}: not run, {reason}"]
            rows.append(row + ["-"] * (len(header) - 1))
    return tables.markdown(header, rows)


def chosen_device(wanted: str) -> str:
    """Returns torch's name for the device, and sets jax to use the same.

    Raises:
      RuntimeError: cuda is asked for, but torch or jax does not see it.
    """
    seen = torch_peft.available() and torch_peft.sees_cuda()
    both = seen and jax.default_backend() == "gpu" if wanted != "cpu" else False
    if wanted == "cuda" and not both:
        raise RuntimeError(
            f"--device=cuda: torch sees cuda: {seen}; jax runs on "
            f"{jax.default_backend()}; install both for CUDA, or pass --device=cpu"
        )
    if both:  # float32 must mean float32, in both
        jax.config.update("jax_default_matmul_precision", "highest")
        return "cuda"
    jax.config.update("jax_platforms", "cpu")
    return "cpu"


def main(argv: Sequence[str]) -> None:
    """Compares every method and prints the tables."""
    del argv
    flag = flags.FLAGS
    adapt_cost.pin(flag.threads)
    kept = _KEEP.value and _DEVICE.value != "cuda" and memory.keep()
    jax.config.update("jax_enable_compilation_cache", False)
    setting = Setting(_DTYPE.value, chosen_device(_DEVICE.value), _COMPILE.value)
    if torch_peft.available():
        torch_peft.pin(flag.threads)
    shape = gpt2.Shape(layers=flag.layers, width=flag.width, batch=flag.batch)
    facts = tables.about(PACKAGES) | {"malloc_keeps": kept}
    result: dict[str, Any] = {"about": facts, "shape": dataclasses.asdict(shape)}
    print(tables.caption(facts) + "\n", flush=True)
    results = {}
    for method in _METHODS.value:
        results[method] = compare(method, shape, setting, flag.rounds)
        print(f"{method} agrees to {results[method]['deviation']:.0e}", flush=True)
    print("\n" + table(results), flush=True)
    result["steps"] = results
    if _PROFILE.value:
        parts = {
            method: profiles.measured(method, shape, setting.dtype, setting.device)
            for method in _METHODS.value
        }
        result["profile"] = parts
        print("\n" + profiles.table(parts), flush=True)
    if flag.out:
        pathlib.Path(flag.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
