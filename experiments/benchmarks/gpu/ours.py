"""lorax's part: train steps by method, attention and base; decoding; shared files.

The steps are those with which `experiments` trains: `experiments.tasks.losses`, a model
of `lorax.models`, `lorax.training.make_train_step`.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lorax
from experiments.benchmarks.gpu.sizes import Sizes
from experiments.benchmarks.rivals import trainers
from experiments.generation import quantizing
from experiments.tasks import losses
from lorax import training
from lorax.interop import hf, peft
from lorax.models import decoding, llama


class Row(NamedTuple):
    """A train step of the table.

    Attributes:
      method: "lora", "dora", "adalora" or "full".
      attention: as in `llama.Config`; "": as in the sizes.
      remat: as in `llama.Config`.
      scan: likewise.
      quantize: the format of the base; "": none.
      chunk: as in `losses.make_causal`; 0: the logits of all tokens at once.
    """

    method: str = "lora"
    attention: str = ""
    remat: str = "none"
    scan: bool = True
    quantize: str = ""
    chunk: int = losses.AUTO


ROWS = {
    "lora": Row(),
    "dora": Row("dora"),
    "adalora": Row("adalora"),
    "full": Row("full"),
    "lora, logits of all tokens at once": Row(chunk=0),
    "lora, layers unrolled": Row(scan=False),
    "lora, recomputed": Row(remat="full"),
    "lora, recomputed, plain attention": Row(remat="full", attention="plain"),
    "lora, int8 base": Row(quantize="int8"),
    "lora, nf4 base": Row(quantize="nf4"),
}
PEFT = ("lora", "dora", "adalora")
"""Rows whose adapters PEFT starts from."""


class Trainer(NamedTuple):
    """A compiled train step.

    Attributes:
      steps: makes a number of steps and waits; returns the loss before each update.
      facts: build seconds, and bytes as XLA counts them.
    """

    steps: Callable[[int], list[float]]
    facts: dict[str, float]


def write_files(sizes: Sizes, directory: pathlib.Path) -> None:
    """Initialises base and adapters, and writes what every program starts from."""
    dtype = jnp.dtype(sizes.dtype)
    config = llama.Config.from_hf(sizes.model, dtype=dtype, param_dtype=dtype)
    model = llama.Model(config)
    init = jax.jit(model.init)(jax.random.key(0), *hf.example(model))
    hf.save(directory, config, init["params"])
    for method in PEFT:
        _, params = _base(directory, True, "")
        adapters, base = _adapted(sizes, Row(method), model, params)
        peft.save(directory / method, adapters, config, params=base)


@functools.lru_cache(maxsize=1)
def _base(directory: pathlib.Path, scan: bool, quantize: str) -> tuple[Any, Any]:
    """Returns the model and its parameters."""
    return hf.load(directory, scan=scan, quantize=quantizing.rules(quantize) or None)


def make_trainer(sizes: Sizes, directory: pathlib.Path, name: str) -> Trainer:
    """Compiles a row.

    Args:
      sizes: of the benchmark.
      directory: of the checkpoint.
      name: of the row.
    """
    row = ROWS[name]
    model, params = _base(directory, row.scan, row.quantize)
    adapters, base = _adapted(sizes, row, model, params)
    penalty = 0.0
    if row.method == "adalora":  # PEFT adds it to the loss that it returns
        penalty = float(trainers.peft_penalty(adapters))
    attention = row.attention or sizes.attention
    config = dataclasses.replace(model.config, attention=attention, remat=row.remat)
    model = llama.Model(config)
    loss = training.simple_loss(losses.make_causal(model, chunk=row.chunk))
    tx = trainers.optimizer(row.method, adapters)
    step = training.make_train_step(loss, tx, on_merge="error")
    state = training.create_state(jax.random.key(0), adapters, tx)
    del adapters
    trainer = _compiled(step, state, base, _batch(sizes))
    trainer.facts["penalty"] = penalty
    return trainer


def _adapted(sizes: Sizes, row: Row, model: Any, params: Any) -> tuple[Any, Any]:
    """Returns adapters on every linear kernel of the base, the same in every call."""
    loss = losses.make_causal(model)
    kernels = lorax.discover(loss, params, _batch(sizes))
    target = lorax.Target(
        ".*" if row.method == "full" else "all-linear",
        rank=sizes.rank,
        alpha=2.0 * sizes.rank,
        adapter=row.method,
    )
    return lorax.init(jax.random.key(0), params, [target], kernels)


def _batch(sizes: Sizes) -> dict[str, jax.Array]:
    tokens = jnp.asarray(sizes.draw())
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": jnp.ones((sizes.batch, sizes.time)),
        "bytes": jnp.full(sizes.batch, sizes.time),
    }


def _compiled(step: Any, state: Any, base: Any, batch: Any) -> Trainer:
    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, base, batch)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()

    def steps(count: int) -> list[float]:
        nonlocal state
        found = []
        for _ in range(count):
            state, metrics = compiled(state, base, batch)
            found.append(metrics["loss"])
        return [float(loss) for loss in jax.block_until_ready(found)]

    held = sum(x.nbytes for x in jax.tree.leaves(base))
    facts = {"build_seconds": seconds, "base_bytes": held}
    facts["temporary_bytes"] = memory.temp_size_in_bytes
    facts["argument_bytes"] = memory.argument_size_in_bytes
    return Trainer(steps, facts)


DECODERS = {
    "merged": "",
    "adapters beside the base": "",
    "adapters beside an nf4 base": "nf4",
}
"""Row of the table -> the format of the base."""


def decoder(sizes: Sizes, directory: pathlib.Path, name: str) -> Callable[[], Any]:
    """Returns greedy decoding, for one of `DECODERS`."""
    model, params = _base(directory, True, DECODERS[name])
    adapters = peft.load(directory / "lora", model.config, params)
    engine = decoding.causal(model, sizes.prompt + sizes.new)
    if name == "merged":
        state: tuple[Any, ...] = (jax.jit(lorax.merge)(adapters, params),)
    else:
        engine, state = engine.map(lorax.adapt), (adapters, params)
    generate = decoding.make_generate(
        engine, batch=sizes.batch, bucket=sizes.prompt, chunk=sizes.new
    )
    prompts = sizes.draw()[:, : sizes.prompt].tolist()
    return functools.partial(generate, state, prompts, sizes.new)
