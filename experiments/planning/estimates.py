"""Plans: what one chip would hold and do, according to the compiler."""

import math
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

from experiments.planning import program, roofline, traffic
from experiments.planning import topology as topologies
from lorax import analysis

RESERVE = 0.1
"""Share of memory that a plan should leave free."""


class Memory(NamedTuple):
    """Bytes on one chip.

    Attributes:
      weights: frozen parameters.
      adapters: what trains.
      optimizer: the optimiser's state, and the rest of the train state.
      batch: the examples.
      activations: the compiler's temporaries, gradients included.
      program: the code.
      evaluation: temporaries of an evaluation between steps, beside the first three;
        None: not asked for.
      arguments: all arguments as the compiler lays them out: the first four, padded.
      limit: the memory of the chip; None: unknown.
    """

    weights: int
    adapters: int
    optimizer: int
    batch: int
    activations: int
    program: int
    evaluation: int | None
    arguments: int
    limit: float | None

    @property
    def total(self) -> int:
        """Bytes of arguments (the state is updated in place), temporaries and code."""
        return self.arguments + self.activations + self.program

    @property
    def headroom(self) -> float | None:
        """Share of the memory that is left."""
        return None if self.limit is None else 1 - self.total / self.limit


class Plan(NamedTuple):
    """The result of a compilation.

    Attributes:
      topology: what it was compiled for.
      mesh: sizes by axis.
      settings: what a search may change, in words.
      memory: of one chip; None if the compiler ran out of it.
      refused: the compiler's own words, if it did.
      flops: operations of one chip in a step, with recomputation; attention counts as
        plain, where every token reads every other.
      model_flops: without recomputation.
      facts: read from the program's text; None: it could not be written out.
      times: of a step; None on a CPU, or if the text could not be read.
      seconds: of tracing and compiling.
      tokens: in a batch.
    """

    topology: topologies.Topology
    mesh: dict[str, int]
    settings: str
    memory: Memory | None
    refused: str
    flops: float
    model_flops: float
    facts: traffic.Facts | None
    times: roofline.Times | None
    seconds: float
    tokens: int

    @property
    def pace(self) -> float:
        """Tokens per second and chip, at `times.apart`; 0 if it is unknown."""
        if self.times is None:
            return 0.0
        return self.tokens / self.topology.chips / self.times.apart

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation: the model's operations over the peak, likewise."""
        return self.times.products / self.times.apart if self.times else 0.0

    @property
    def verdict(self) -> str:
        """Whether it fits, in words."""
        if self.memory is None:
            return "does not fit"
        room = self.memory.headroom
        if room is None:
            return "no limit known"
        if room < 0:
            return "does not fit"
        return "fits" if room >= RESERVE else f"fits, with less than {RESERVE:.0%} room"


def make_plan(
    config: ml_collections.ConfigDict,
    topology: topologies.Topology,
    form: str = "adapt",
    evaluated: bool = False,
) -> Plan:
    """Compiles the train step of a config for a topology.

    Args:
      config: see `program.build`.
      topology: from `topology.parse`.
      form: see `program.build`.
      evaluated: also compiles an evaluation, for the memory that it takes.

    Raises:
      ValueError: see `program.build` and `topology.devices`.
      ModuleNotFoundError: libtpu is missing.
    """
    began = time.perf_counter()
    devices = topologies.devices(topology)
    built = program.build(config, devices, form)
    traced = built.trace()
    spelled, plain = (
        program.build(other, devices[:1], form).trace()
        for other in (program.spelled_out(config), program.without_remat(config))
    )
    platform = "cpu" if topology.chip is None else "tpu"
    told: dict[str, Any] = {
        "topology": topology,
        "mesh": dict(built.placed.mesh.shape),
        "settings": settings(config, built.placed.mesh.shape, form),
        "flops": analysis.operations(spelled.jaxpr) / topology.chips,
        "model_flops": analysis.operations(plain.jaxpr) / topology.chips,
        "tokens": built.tokens,
    }
    try:
        compiled, facts = _compile(traced.lower(lowering_platforms=(platform,)))
        evaluation = None
        if evaluated:
            lowered = built.trace_evaluation().lower(lowering_platforms=(platform,))
            evaluation = lowered.compile().memory_analysis().temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(
            **told,
            memory=None,
            refused=re.sub(r"\s*See https.*", "", str(error), flags=re.DOTALL),
            facts=None,
            times=None,
            seconds=time.perf_counter() - began,
        )
    seconds = time.perf_counter() - began
    return Plan(
        **told,
        memory=_memory(built, compiled, evaluation, topology),
        refused="",
        facts=facts,
        times=_times(told, facts, built.placed.mesh, topology),
        seconds=seconds,
    )


def _times(
    told: Mapping[str, Any],
    facts: traffic.Facts | None,
    mesh: jax.sharding.Mesh,
    topology: topologies.Topology,
) -> roofline.Times | None:
    """Returns the terms of a step's time."""
    chip = topology.chip
    if chip is None or facts is None:
        return None
    flops, model_flops = told["flops"], told["model_flops"]
    return roofline.Times(
        products=model_flops / chip.flops,
        recomputed=(flops - model_flops) / chip.flops,
        hbm=facts.hbm / chip.bandwidth,
        transfers=roofline.transfer_seconds(
            facts.collectives, [*mesh.devices.flat], topology
        ),
    )


def settings(
    config: ml_collections.ConfigDict,
    mesh: Mapping[str, int],
    form: str = "adapt",
) -> str:
    """Returns what a search may change, in words."""
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.items())
    (method,) = config.run.methods
    merged = ", merged kernels" if form == "merge" else ""
    quantize = config.model.get("quantize", "")
    base = f", {quantize} base" if quantize else ""
    flash = ", flash" if config.model.get("attention") == "flash" else ""
    return (
        f"{method}{merged}{base}, {sizes}, {config.data.batch_size} x "
        f"{max(config.data.lengths)} tokens, remat {config.model.remat}{flash}"
    )


def shard_bytes(tree: Any) -> int:
    """Returns the bytes of one device's shards of abstract arrays."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
        return math.prod(leaf.shape) * leaf.dtype.itemsize
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _memory(
    built: program.Program,
    compiled: Any,
    evaluation: int | None,
    topology: topologies.Topology,
) -> Memory:
    found = compiled.memory_analysis()
    state = built.state
    adapters = shard_bytes(state.adapters)
    return Memory(
        weights=shard_bytes(built.params),
        adapters=adapters,
        optimizer=shard_bytes(state) - adapters,
        batch=shard_bytes(built.batch),
        activations=found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes,
        program=found.generated_code_size_in_bytes,
        evaluation=evaluation,
        arguments=found.argument_size_in_bytes,
        limit=topology.chip.hbm if topology.chip else None,
    )


def _compile(lowered: Any) -> tuple[Any, traffic.Facts | None]:
    """Compiles, and reads the program's text.

    `as_text` of libtpu 0.0.52 fails on some large programs (RET_CHECK in
    hlo_instruction.cc), so the text that the compiler itself dumps is the fallback.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(
            {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        )
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError:
            written = sorted(pathlib.Path(folder).glob("*.after_codegen.txt"))
            text = written[-1].read_text() if written else ""
    return compiled, traffic.read(text) if text else None
