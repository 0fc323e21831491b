"""Other meshes, remat policies and batches, by the memory that they should need.

Compiling takes a minute, so at most LIMIT candidates are compiled; they are ranked by
an estimate that takes none, and the least memory comes first.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import ml_collections

from experiments.planning import estimates, program
from experiments.planning import topology as topologies

LIMIT = 12
REMAT = ("full", "dots")
BATCHES = (1, 2)
"""Times the batch of the config."""


class Candidate(NamedTuple):
    """One setting.

    Attributes:
      config: of the run.
      estimate: bytes of one chip, roughly; see `estimate`.
    """

    config: ml_collections.ConfigDict
    estimate: float


def candidates(
    config: ml_collections.ConfigDict, topology: topologies.Topology
) -> list[Candidate]:
    """Returns the settings that the shapes allow, the least memory first.

    Meshes have a power of two of tensor devices, up to 16, and no copies of the model
    beyond what the config has.
    """
    devices = topologies.devices(topology)
    found = []
    data = max(config.sharding.data, 1)
    whole = data * config.sharding.get("context", 1)  # neither is searched
    tensors = [n for n in (1, 2, 4, 8, 16) if topology.chips % (n * whole) == 0]
    for tensor, remat, times in itertools.product(tensors, REMAT, BATCHES):
        other = config.copy_and_resolve_references()
        other.sharding.fsdp = topology.chips // (whole * tensor)
        other.sharding.data, other.sharding.tensor = data, tensor
        other.model.remat = remat
        other.data.batch_size = config.data.batch_size * times
        try:
            built = program.build(other, devices)
        except ValueError:  # an axis, or the batch, that this mesh does not divide
            continue
        found.append(Candidate(other, estimate(built, other)))
    return sorted(found, key=lambda one: one.estimate)


def estimate(built: program.Program, config: ml_collections.ConfigDict) -> float:
    """Bytes of one chip: arguments, what remat keeps, and the logits thrice.

    "full" keeps what flows between layers; "dots" also every product's result, about
    four times the width and thrice the MLP's. It ranks candidates, no more.
    """
    model = program.make_model(config.model).config
    mesh = built.placed.mesh.shape
    shares = mesh["data"] * mesh["fsdp"] * mesh.get("context", 1)
    rows = built.tokens / shares  # of one chip
    width = model.width
    inner = 4 * width + 3 * getattr(model, "hidden", 4 * width)
    kept = width + (inner / mesh["tensor"] if config.model.remat == "dots" else 0)
    layers = math.fsum(model.stacks.values())
    activations = rows * layers * kept * model.dtype.itemsize
    logits = 3 * 4 * rows * model.vocabulary / mesh["tensor"]
    held = estimates.shard_bytes((built.params, built.state, built.batch))
    return held + activations + logits


def run(
    config: ml_collections.ConfigDict,
    topology: topologies.Topology,
    tell: Callable[[str], None] = lambda _: None,
) -> list[estimates.Plan]:
    """Compiles the first LIMIT candidates.

    Args:
      config: of the run.
      topology: to compile for.
      tell: gets a line about each, as it is done.

    Raises:
      ValueError: no mesh fits the shapes.
    """
    found = candidates(config, topology)
    if not found:
        raise ValueError(
            f"{topology}: no mesh divides the batch of {config.data.batch_size} and "
            "the axes of the leaves; change data.batch_size"
        )
    plans = []
    for candidate in found[:LIMIT]:
        plan = estimates.make_plan(candidate.config, topology)
        plans.append(plan)
        tell(f"{plan.settings}: {plan.verdict} ({plan.seconds:.0f} s)")
    return plans


def render(plans: list[estimates.Plan]) -> str:
    """Returns the plans as a table, the least time a token first, what fits above."""
    gib = topologies.GIB

    def pace(p: estimates.Plan) -> float:
        return p.step_seconds / p.tokens if p.step_seconds else math.inf

    def fits(p: estimates.Plan) -> bool:
        return p.memory is not None and (p.memory.headroom or 0) >= 0

    lines = [f"{'GiB a chip':>10} {'room':>7} {'us a token':>11}  settings"]
    for plan in sorted(plans, key=lambda p: (not fits(p), pace(p))):
        total = f"{plan.memory.total / gib:.2f}" if plan.memory else "-"
        room = plan.memory.headroom if plan.memory else None
        said = f"{room:.1%}" if room is not None else "none"
        each = f"{1e6 * pace(plan):.3f}" if plan.step_seconds else "-"
        lines.append(f"{total:>10} {said:>7} {each:>11}  {plan.settings}")
    lines.append(f"Microseconds: {estimates.LABEL}, transfers left out.")
    return "\n".join(lines)
