"""What a LoRA step costs on a quantised base, compared with a dense one.

    python -m experiments.benchmarks.quantized.step_cost \
        --quantized_model=SmolLM2-135M-Instruct.Q4_1.gguf

Value and gradient with respect to LoRA of rank 8 on every linear kernel, interleaved in
one run: bytes of the base, XLA's temporary memory, the time of a step, and the time to
decode every kernel once, all relative to the dense base. A step decodes each kernel
twice, forward and backward; with `--quantized_remat=full` three times.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

import lorax
from experiments import paired
from experiments.generation import loading, quantizing
from experiments.machine import tables, timing

_MODEL = flags.DEFINE_string("quantized_model", "stories260k", "The model.")
_ROUNDS = flags.DEFINE_integer("quantized_rounds", 5, "Interleaved rounds.")
_ROWS = flags.DEFINE_integer("quantized_rows", 8, "Sequences of a batch.")
_LENGTH = flags.DEFINE_integer("quantized_length", 64, "Tokens of a sequence.")
_REMAT = flags.DEFINE_enum("quantized_remat", "none", ["none", "full"], "As config's.")

FORMS = ("", "int8", "int4", "nf4", "fp8")
RANK = 8


class Case(NamedTuple):
    """A compiled step on one base.

    Attributes:
      step: makes a step.
      decode: decodes every quantised kernel once.
      base_bytes: bytes of the parameters.
      temporaries: bytes that XLA needs beside arguments and results.
    """

    step: Callable[[], Any]
    decode: Callable[[], Any]
    base_bytes: int
    temporaries: int


def make_case(model: Any, base: Any, tokens: jax.Array, form: str) -> Case:
    """Compiles the step on a base of one format."""

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked[..., 0])

    base = quantizing.quantized(model, base, form)
    kernels = lorax.discover(loss, base, tokens)
    target = lorax.Target("all-linear", rank=RANK)
    adapters, base = lorax.init(jax.random.key(0), base, target, kernels)
    step = jax.jit(jax.value_and_grad(lorax.adapt(loss)))
    compiled = step.lower(adapters, base, tokens).compile()
    memory: Any = compiled.memory_analysis()
    packed = [x for x in lorax.tree.flatten(base).values() if quantizing.packed(x)]
    decode = jax.jit(lambda leaves: [jnp.max(jnp.asarray(leaf)) for leaf in leaves])
    return Case(
        functools.partial(compiled, adapters, base, tokens),
        functools.partial(decode, packed),
        sum(x.nbytes for x in jax.tree.leaves(base)),
        memory.temp_size_in_bytes,
    )


def compare(
    source: str, rows: int, length: int, rounds: int, remat: str = "none"
) -> dict[str, dict[str, float]]:
    """Returns the figures of every format; arguments are those of the flags."""
    model, base, _ = loading.load_model(source, remat=remat)
    high = model.config.vocabulary
    tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, high)
    cases = {form: make_case(model, base, tokens, form) for form in FORMS}
    seconds = timing.interleave({f: case.step for f, case in cases.items()}, rounds)
    packed = {form: case.decode for form, case in cases.items() if form}
    decoding = {"": [0.0], **timing.interleave(packed, rounds)}
    dense = cases[""]
    return {
        form or "float32": {
            "base_bytes": case.base_bytes / dense.base_bytes,
            "temporaries": case.temporaries / dense.temporaries,
            "step": paired.ratio(seconds[form], seconds[""]),
            "best_ms": 1e3 * min(seconds[form]),
            "decode": min(decoding[form]) / min(seconds[""]),
        }
        for form, case in cases.items()
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    """Returns the figures as markdown."""
    header = ["base", "bytes of the base", "temporaries", "step, paired", "best ms"]
    header.append("decoding once / dense step")
    return tables.markdown(
        header,
        [
            [
                form,
                f"{row['base_bytes']:.3f}",
                f"{row['temporaries']:.3f}",
                f"{row['step']:.2f}",
                f"{row['best_ms']:.0f}",
                f"{row['decode']:.2f}",
            ]
            for form, row in figures.items()
        ],
    )


def main(argv: Sequence[str]) -> None:
    """Measures and prints the table."""
    del argv
    sizes = _ROWS.value, _LENGTH.value, _ROUNDS.value
    figures = compare(_MODEL.value or "", *sizes, _REMAT.value)
    print(f"{tables.caption(tables.about(('jax',)))}\n\n{table(figures)}")


if __name__ == "__main__":
    app.run(main)
