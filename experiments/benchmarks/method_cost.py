"""What a gradient costs with each parametrisation, compared with rank-8 LoRA.

    python -m experiments.benchmarks.method_cost

A network of square kernels with tanh between them, every kernel adapted. Prints a
markdown table: trainable parameters, and XLA's count of FLOPs and temporary memory of
the compiled gradient, as ratios to LoRA's. Methods get settings that train at most as
many parameters as LoRA.

Methods that act on a kernel's inputs need the gradient with respect to what they
return, which LoRA does not need at the first kernel: one product on top of
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
    """The cost of one method.

    Attributes:
      parameters: number of trainable parameters, over all kernels.
      flops: of the gradient, as XLA counts them.
      temp: bytes of temporary memory, as XLA counts them.
    """

    parameters: int
    flops: float
    temp: int


def loss(params: Any, x: jax.Array) -> jax.Array:
    """Returns a scalar of the network's output."""
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
