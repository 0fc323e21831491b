"""What quantising real kernels loses, and how much LoftQ and QPiSSA recover.

    python -m experiments.benchmarks.quantized.quantization_loss
    python -m experiments.benchmarks.quantized.quantization_loss \
        --checkpoint=model.gguf --of_layers=15 --ranks=8,16,64

Prints a markdown table of || W - (Q + s A B) ||_F / || W ||_F over all kernels that
"all-linear" matches, in groups of 64 inputs. "QPiSSA" is its first iteration, which
quantises what PiSSA leaves; the numbers in other columns are steps of `lorax.loftq`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import lorax
from experiments.generation import loading
from experiments.machine import tables
from lorax.interop import hf
from lorax.quantized import NF4, Format, Int4

_CHECKPOINT = flags.DEFINE_string("checkpoint", "stories260k", "A directory or GGUF.")
_LAYERS = flags.DEFINE_list("of_layers", [], "Layers of the model; empty: all.")
_RANKS = flags.DEFINE_list("ranks", ["4", "16"], "Ranks of the adapters.")

FORMATS: dict[str, Format] = {"NF4": NF4(), "int4": Int4()}
WAYS = {
    "LoftQ 1": ("standard", 1),
    "LoftQ 5": ("standard", 5),
    "QPiSSA": ("pissa", 0),
    "QPiSSA 1": ("pissa", 1),
    "QPiSSA 5": ("pissa", 5),
}
"""Column -> (init, steps of `loftq`); 0 steps: the residual is quantised."""

Kernels = Mapping[str, lorax.Kernel]


def linear(
    model: Any, params: Any, layers: Sequence[int]
) -> tuple[dict[str, jax.Array], Kernels]:
    """Returns kernels with a multiple of 64 inputs, of some layers, and their use.

    Args:
      model: of `lorax.models`.
      params: dense.
      layers: indices of the layers to take from each stack; empty: all.
    """
    call = lambda params, *tokens: model.apply({"params": params}, *tokens)
    found = lorax.discover(call, params, *hf.example(model))
    target = lorax.Target("all-linear", rank=1)
    chosen = lorax.init(jax.random.key(0), params, target, found)[0]
    leaves: dict[str, jax.Array] = {}
    kernels: dict[str, lorax.Kernel] = {}
    for path in chosen:
        leaf, axes = lorax.tree.flatten(params)[path], found[path].linear_axes()
        leaf = leaf[jnp.array(layers)] if layers and axes.batch == (0,) else leaf
        inputs = [leaf.shape[axis] for axis in axes.in_]
        if jnp.prod(jnp.array(inputs)) % 64 == 0:
            leaves[path] = leaf
            kernels[path] = dataclasses.replace(found[path], shape=leaf.shape)
    return leaves, kernels


def losses(
    dense: Mapping[str, jax.Array], kernels: Kernels, form: Format, rank: int
) -> dict[str, float]:
    """Returns the relative error by column, with "plain" first."""

    def lost(init: str, steps: int) -> float:
        target = lorax.Target("all-linear", rank=rank, init=init)
        given = lorax.init(jax.random.key(0), dict(dense), target, kernels)
        if steps:
            given = lorax.loftq(*given, form, kernels, steps=steps)
        else:
            given = given[0], lorax.quantize(given[1], form, kernels)
        return relative(lorax.merge(*given), dense)

    plain = relative(lorax.merge({}, lorax.quantize(dict(dense), form, kernels)), dense)
    return {"plain": plain, **{name: lost(*way) for name, way in WAYS.items()}}


def relative(found: Mapping[str, jax.Array], dense: Mapping[str, jax.Array]) -> float:
    """Returns the relative error of all kernels together in the Frobenius norm."""
    squares = lambda leaves: sum(float(jnp.sum(leaf**2)) for leaf in leaves)
    error = squares(found[path] - dense[path] for path in dense)
    return (error / squares(dense.values())) ** 0.5


def main(argv: Sequence[str]) -> None:
    """Measures every format and rank and prints the table."""
    del argv
    model, params = loading.read(loading.find(_CHECKPOINT.value), dtype=jnp.float32)
    dense, kernels = linear(model, params, [int(n) for n in _LAYERS.value])
    count = sum(leaf.size for leaf in dense.values())
    print(f"{tables.caption(tables.about(('jax',)))}; {count:,} weights\n")
    header = ["format", "rank", "plain", *WAYS]
    rows = []
    for name, form in FORMATS.items():
        for rank in map(int, _RANKS.value):
            found = losses(dense, kernels, form, rank)
            rows.append([name, str(rank), *(f"{x:.4f}" for x in found.values())])
            print(rows[-1], flush=True)
    print(f"\n{tables.markdown(header, rows)}")


if __name__ == "__main__":
    app.run(main)
