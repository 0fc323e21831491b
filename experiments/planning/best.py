"""Finds the best mesh, remat, batch and base format for a run on a topology.

Compiling takes minutes, so settings are first ranked by quick estimates of their memory
and time per token. Of those that should fit, the EACH fastest of every base format are
compiled, because the estimates do not know how well the compiler unpacks a format.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from experiments.planning import estimates, program
from experiments.planning import topology as topologies
from lorax import analysis, sharding
from lorax.interop import hf
from lorax.models import remat

EACH = 2
"""Settings to compile for each base format."""
TENSOR = (1, 2, 4, 8, 16)
"""Devices along the tensor axis."""
REMAT = (
    "full",
    "offload=input",
    "save=attention",
    "save=q,k,v",
    "save=q,k,v,o",
    "dots",
)
BATCHES = (0.5, 1, 2, 4)
"""Multiples of the config's batch."""
FORMATS = ("", "int8", "nf4")
"""Formats of the base, if adapters train."""


class Candidate(NamedTuple):
    """One setting.

    Attributes:
      config: of the run.
      memory: estimated bytes on one chip.
      seconds: estimated seconds of one chip per token.
    """

    config: ml_collections.ConfigDict
    memory: float
    seconds: float


class Layer(NamedTuple):
    """What one token needs in one layer.

    Attributes:
      sizes: elements of each named tensor.
      operations: operations that compute each.
    """

    sizes: dict[str, int]
    operations: dict[str, int]


def candidates(
    config: ml_collections.ConfigDict, topology: topologies.Topology
) -> list[Candidate]:
    """Returns the settings that the shapes allow, the fastest per token first.

    None of them holds more copies of the model than the config does.
    """
    devices, found = topologies.devices(topology), []
    (method,) = config.run.methods
    formats = FORMATS if method == "lora" else ("",)
    data = max(config.sharding.data, 1)
    kept = [config.sharding.get(axis, 1) for axis in sharding.OPTIONAL]
    whole = data * math.prod(kept)  # these axes are not searched
    for tensor, quantize in itertools.product(TENSOR, formats):
        if topology.chips % (tensor * whole):
            continue
        other = config.copy_and_resolve_references()
        other.sharding.data, other.sharding.tensor = data, tensor
        other.sharding.fsdp = topology.chips // (tensor * whole)
        other.model.quantize = quantize
        other.data.batch_size = sharding.row_parts(other.sharding)
        other.eval.batch_size = other.data.batch_size
        try:
            built = program.build(other, devices)
        except ValueError:  # this mesh does not divide an axis
            continue
        found += _sized(other, config.data.batch_size, built, topology)
    return sorted(found, key=lambda one: one.seconds)


def run(
    config: ml_collections.ConfigDict,
    topology: topologies.Topology,
    tell: Callable[[str], None] = lambda _: None,
) -> list[estimates.Plan]:
    """Compiles the candidates of each format that should fit and be the fastest.

    Args:
      config: of the run.
      topology: to compile for.
      tell: called with a line about each plan when it is done.

    Raises:
      ValueError: no mesh divides the shapes, or nothing fits in memory.
    """
    found = candidates(config, topology)
    if not found:
        raise ValueError(
            f"{topology}: no mesh divides both the axes of the leaves and a batch of "
            f"{config.data.batch_size}, or half, twice or four times that; change "
            "data.batch_size"
        )
    room = topology.chip.hbm * (1 - estimates.RESERVE) if topology.chip else math.inf
    fitting = [one for one in found if one.memory <= room]
    if not fitting:
        least = min(one.memory for one in found) / topologies.GIB
        raise ValueError(
            f"{topology}: of {len(found)} settings, even the smallest should take "
            f"{least:.1f} GiB per chip; use more chips, or a smaller data.batch_size"
        )
    tell(f"{len(found)} settings, of which {len(fitting)} should fit")
    plans = []
    for candidate in _fastest(fitting):
        plan = estimates.make_plan(candidate.config, topology)
        plans.append(plan)
        tell(f"{plan.settings}: {plan.verdict} ({plan.seconds:.0f} s)")
    return plans


def render(plans: list[estimates.Plan]) -> str:
    """Returns the plans as a table: those that fit first, each group by speed."""
    gib = topologies.GIB

    def fits(p: estimates.Plan) -> bool:
        return p.memory is not None and (p.memory.headroom or 0) >= 0

    lines = [f"{'GiB/chip':>10} {'room':>7} {'tokens/s/chip':>14} {'MFU':>6}  settings"]
    for plan in sorted(plans, key=lambda p: (not fits(p), -p.pace)):
        total = f"{plan.memory.total / gib:.2f}" if plan.memory else "-"
        room = plan.memory.headroom if plan.memory else None
        said = f"{room:.1%}" if room is not None else "none"
        pace, mfu = (
            (f"{plan.pace:,.0f}", f"{plan.mfu:.1%}") if plan.pace else ("-", "-")
        )
        lines.append(f"{total:>10} {said:>7} {pace:>14} {mfu:>6}  {plan.settings}")
    lines.append("Estimates, not measured; products, HBM and transfers do not overlap.")
    return "\n".join(lines)


def _fastest(found: list[Candidate]) -> list[Candidate]:
    """Returns the first EACH of every format."""
    own = {q: [c for c in found if c.config.model.quantize == q] for q in FORMATS}
    return [candidate for some in own.values() for candidate in some[:EACH]]


def _sized(
    config: ml_collections.ConfigDict,
    rows: int,
    built: program.Program,
    topology: topologies.Topology,
) -> list[Candidate]:
    """Returns the candidates of one mesh and format: every remat and batch.

    Args:
      config: their config, with one row for each part of the batch.
      rows: the run's batch size.
      built: the program of that config.
      topology: to compile for.
    """
    model, mesh = program.make_model(config.model).config, built.placed.mesh.shape
    parts = sharding.row_parts(mesh)
    held = estimates.shard_bytes((built.params, built.state))
    one = built.placed.mesh.devices.ravel()[:1]
    plain = program.build(program.without_remat(config), one)
    operations = analysis.operations(plain.trace().jaxpr) / plain.tokens
    gathered = estimates.shard_bytes(built.params) * (mesh["fsdp"] - 1)
    chip = topology.chip or topologies.CHIPS["v5e"]
    names = hf.family_of(model.to_hf(), "config.model").NAMES
    layer, depth, found = _layer(model), model.layers, []
    for policy, times in itertools.product(REMAT, BATCHES):
        kept = _kept(policy)
        named = kept if remat.parse(policy) else ()
        if rows * times % parts or not {*named} <= {*names}:
            continue
        other = config.copy_and_resolve_references()
        other.model.remat = policy
        other.data.batch_size = other.eval.batch_size = int(rows * times)
        shares = parts * mesh.get("context", 1)
        tokens = other.data.batch_size * max(config.data.lengths) / shares  # of a chip
        again = sum(n for name, n in layer.operations.items() if name not in kept)
        work = operations + again * depth
        # leaves are gathered for both passes and the recomputation between them; tensor
        # devices sum the outputs of o and down as often, and their gradients
        tensor = mesh["tensor"]
        summed = 12 * depth * model.width * model.dtype.itemsize * (1 - 1 / tensor)
        step = tokens * work / tensor / chip.flops
        step += (3 * gathered + tokens * summed) / (2 * chip.link)
        if config.model.quantize:  # each time unpacked kernels are written and read
            kernels = sum(layer.operations.values()) / 2 * depth * model.dtype.itemsize
            step += 3 * 2 * kernels / tensor / chip.bandwidth
        memory = held + tokens * _each(model, layer, policy, config, tensor)
        found.append(Candidate(other, memory, step * tensor / tokens))
    return found


def _layer(model: Any) -> Layer:
    """Returns what a token needs in a layer, from a decoder's sizes."""
    kv = getattr(model, "kv_heads", model.heads)
    size = getattr(model, "head_dim", model.width // model.heads)
    mixed, shared, width = model.heads * size, kv * size, model.width
    hidden = model.hidden * getattr(model, "chosen", 1)  # of all the experts it visits
    sizes = {"input": width, "q": mixed, "k": shared, "v": shared, "attention": mixed}
    sizes |= {"o": width, "gate": hidden, "up": hidden, "down": width}
    read = dict.fromkeys(("q", "k", "v", "gate", "up"), width)
    read |= {"o": mixed, "down": hidden}
    return Layer(sizes, {name: 2 * n * sizes[name] for name, n in read.items()})


def _kept(policy: str) -> tuple[str, ...]:
    """Returns the names whose tensors a policy keeps."""
    if policy == "dots":
        return ("q", "k", "v", "o", "gate", "up", "down")
    lists = remat.parse(policy)
    return () if lists is None else (*lists.save, *lists.offload)


def _each(
    model: Any,
    layer: Layer,
    policy: str,
    config: ml_collections.ConfigDict,
    tensor: int,
) -> float:
    """Returns one chip's bytes per token: kept tensors, a working layer, all logits."""
    lists = remat.parse(policy)
    kept = {"input", *_kept(policy)} - {*(lists.offload if lists else ())}
    cut = {
        name: 1 if name in ("input", "o", "down") else tensor for name in layer.sizes
    }
    elements = {name: size / cut[name] for name, size in layer.sizes.items()}
    stack = model.layers * sum(elements[name] for name in kept)
    scores = 0.0
    if config.model.attention == "plain":  # in float32, and their gradient
        scores = 3 * 4 * model.heads / tensor * max(config.data.lengths)
    working = 2 * sum(elements.values())
    logits = 3 * 4 * model.vocabulary / tensor if config.run.loss_chunk == 0 else 0.0
    return (stack + working) * model.dtype.itemsize + max(scores, logits)
