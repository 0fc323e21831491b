"""Plans of runs whose speed others have published: how far off an estimate is.

    lorax plan --published

They are MaxText's full fine-tuning on whole slices, with the batches, lengths and remat
of its recipes (github.com/AI-Hypercomputer/tpu-recipes, `training/trillium`, v0.1.4;
for v5p MaxText's own `configs/v5p/llama2_70b.sh`). Two things differ: the weights are
held twice here, in bfloat16 and float32, and libtpu has its default flags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from configs import llama3_8b_lora, llama3_70b_lora
from experiments.planning import estimates
from experiments.planning import topology as topologies

ERROR = "published runs took 1.09 to 1.30 times the step one after another"
"""The error of estimates, from the table that `compare` and `render` make."""


class Run(NamedTuple):
    """A published run.

    Attributes:
      name: of the model and the slice.
      config: makes its config.
      topology: of the slice.
      pace: tokens per second and chip, as published.
      mfu: as published, with attention counted in full.
    """

    name: str
    config: Callable[[], ml_collections.ConfigDict]
    topology: str
    pace: float
    mfu: float


def llama3_8b() -> ml_collections.ConfigDict:
    """Llama 3.1 8B: 4 x 8,192 tokens per chip."""
    config = llama3_8b_lora.get_config().unlock()
    return _trained(config, 4 * 256, 8192, "offload=input,q,k,v,o")


def llama3_70b() -> ml_collections.ConfigDict:
    """Llama 3.1 70B: 5 x 8,192 tokens per chip."""
    config = llama3_70b_lora.get_config().unlock()
    return _trained(config, 5 * 256, 8192, "offload=input,q,k,v")


def llama2_70b() -> ml_collections.ConfigDict:
    """Llama 2 70B: 4 x 4,096 tokens per chip; all but gate and up is saved."""
    config = llama3_70b_lora.get_config().unlock()
    config.model.published.vocab_size = 32_000
    config.model.published.rope_theta = 10_000.0
    return _trained(config, 4 * 256, 4096, "save=q,k,v,o,down")


def _trained(
    config: ml_collections.ConfigDict, rows: int, length: int, remat: str
) -> ml_collections.ConfigDict:
    """Full fine-tuning, with FSDP over all chips and flash attention."""
    config.run.methods = ("full",)
    config.model.remat, config.model.attention = remat, "flash"
    config.data.batch_size = config.eval.batch_size = rows
    config.data.lengths = (length,)
    config.sharding.fsdp, config.sharding.tensor = -1, 1
    return config.lock()


RUNS = (
    Run("Llama 3.1 8B, v6e-256", llama3_8b, "v6e-256", 7207, 0.455),
    Run("Llama 3.1 70B, v6e-256", llama3_70b, "v6e-256", 960, 0.503),
    Run("Llama 2 70B, v5p-512", llama2_70b, "v5p-512", 692, 0.654),
)


def compare(tell: Callable[[str], None]) -> list[tuple[Run, estimates.Plan]]:
    """Plans every run; `tell` gets a line about each when it is done."""
    found = []
    for run in RUNS:
        plan = estimates.make_plan(run.config(), topologies.parse(run.topology))
        tell(f"{run.name}: {plan.settings}: {plan.verdict} ({plan.seconds:.0f} s)")
        found.append((run, plan))
    return found


def render(found: list[tuple[Run, estimates.Plan]]) -> str:
    """Returns a table of published steps, with their ratios to both estimates."""
    head = f"{'':<24}{'published':>10}{'all at once':>22}{'one after another':>22}"
    lines = [head]
    for run, plan in found:
        step = plan.tokens / plan.topology.chips / run.pace
        cells = [f"{step:.2f} s"]
        for estimate in (plan.times.together, plan.times.apart) if plan.times else ():
            cells.append(f"{estimate:.2f} s, ratio {step / estimate:.2f}")
        lines.append(
            f"{run.name:<24}{cells[0]:>10}" + "".join(f"{c:>22}" for c in cells[1:])
        )
        lines.append(
            f"{'':<24}{run.pace:,.0f} tokens/s per chip, MFU {run.mfu:.1%}; "
            f"estimated {plan.pace:,.0f} and {plan.mfu:.1%}"
        )
    return "\n".join(lines)
