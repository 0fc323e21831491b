"""What a gradient costs under each parametrisation beside LoRA's of rank 8.

    python -m experiments.benchmarks.method_cost

A network of square kernels with tanh between them, every kernel adapted. Prints a
markdown table: trainable parameters, XLA's count of the FLOPs of the compiled gradient
and its temporary memory as ratios to LoRA's. Methods are given settings that train
LoRA's number of parameters or fewer.

What acts on a kernel's inputs needs the gradient of what it returns, which the first
kernel of the network does not have to compute under LoRA: one product more of
`2 depth - 1` frozen ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

import lorax

_WIDTH = flags.DEFINE_integer("kernel_width", 1024, "Inputs and outputs of a kernel.")
_TOKENS = flags.DEFINE_integer("tokens", 512, "Rows of the network's input.")

DEPTH = 8
BASELINE = "LoRA"
METHODS: dict[str, Mapping[str, Any]] = {
    BASELINE: {"adapter": "lora", "rank": 8},
    "DoRA": {"adapter": "dora", "rank": 7},
    "VeRA": {"adapter": "vera", "rank": 8},
    "LoRA-XS": {"adapter": "lora_xs", "rank": 8},
    "OFT": {"adapter": "oft"},
    "OFT, inverse": {"adapter": "oft", "options": {"cayley_terms": None}},
    "HRA": {"adapter": "hra", "rank": 16},
    "IA3": {"adapter": "ia3"},
    "IA3, feedforward": {"adapter": "ia3", "options": {"feedforward": True}},
    "LoKr": {"adapter": "lokr", "rank": 8},
    "LoKr, full w2": {"adapter": "lokr", "rank": 16},
    "VeRA, rank 256": {"adapter": "vera", "rank": 256},
    "LoRA-XS, rank 32": {"adapter": "lora_xs", "rank": 32},
    "LoRA-XS, rank 128": {"adapter": "lora_xs", "rank": 128},
    "MiSS": {"adapter": "miss", "rank": 16},
    "DeLoRA": {"adapter": "delora", "rank": 7},
    "LoHa": {"adapter": "loha", "rank": 4},
}


class Cost(NamedTuple):
    """Of one method.

    Attributes:
      parameters: that train, of all kernels.
      flops: of the gradient, by XLA.
      temp: bytes of temporary memory, by XLA.
    """

    parameters: int
    flops: float
    temp: int


def loss(params: Any, x: jax.Array) -> jax.Array:
    """A scalar of the network's output."""
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return jnp.sum(x**2)


def cost(method: Mapping[str, Any], width: int, tokens: int) -> Cost:
    """Returns what the gradient of one method costs; nothing runs."""
    kernel = jax.ShapeDtypeStruct((width, width), jnp.float32)
    params = {f"w{i}": kernel for i in range(DEPTH)}
    x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    target = lorax.Target("w.*", **method)

    def made(params: Any) -> Any:
        return lorax.init(jax.random.key(0), params, target)

    adapters, params = jax.eval_shape(made, params)
    gradient = jax.grad(lorax.adapt(loss, on_merge="error"))
    compiled = jax.jit(gradient).lower(adapters, params, x).compile()
    flops: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    return Cost(count, flops["flops"], memory.temp_size_in_bytes)


def table(names: Iterable[str], width: int, tokens: int) -> list[str]:
    """Returns the lines of the markdown table."""
    first = cost(METHODS[BASELINE], width, tokens)
    lines = [
        "| method | trainable parameters | gradient FLOPs | temporary memory |",
        "|---|---:|---:|---:|",
    ]
    for name in names:
        own = cost(METHODS[name], width, tokens)
        flops, temp = own.flops / first.flops, own.temp / first.temp
        lines.append(f"| {name} | {own.parameters:,} | {flops:.3f} | {temp:.2f} |")
    return lines


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    print("\n".join(table(METHODS, _WIDTH.value, _TOKENS.value)))


if __name__ == "__main__":
    app.run(main)
