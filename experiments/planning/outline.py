"""A model as its config.json or GGUF header describes it, without its weights."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lorax
import lorax.description
from experiments.data import tokenization
from experiments.generation import loading, quantizing
from lorax.interop import files, hf


def read(source: str, labels: int = 0) -> Any:
    """Returns the Flax module of a checkpoint, without reading weights.

    Args:
      source: as for `loading.load_model`; for a hub id, config.json is downloaded.
      labels: of a classification head; 0: what the checkpoint has.

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: an architecture or a field is not implemented.
    """
    switches: dict[str, Any] = {}
    if labels:
        switches = {"labels": labels, "head": "classification"}
    if tokenization.is_gguf(source):
        from lorax.interop.gguf import header, metadata  # an extra
        from lorax.models import llama

        return llama.Model(
            metadata.config(header.read(loading.find(source)), **switches)
        )
    path = loading.find(source, files=("config.json",)) / "config.json"
    fields = files.read_json(path)
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return hf.configured(fields, path, dtype=dtype, param_dtype=dtype, **switches)


class Outline(NamedTuple):
    """What adapters would train in a model.

    Attributes:
      kind: the model's type, as in config.json.
      parameters: number of parameters of the base.
      found: the leaves that train, those that are left out, and why.
      nbytes: bytes that a run holds whatever its batch, by name.
    """

    kind: str
    parameters: int
    found: lorax.description.Description
    nbytes: dict[str, int]


def make(model: Any, targets: Sequence[lorax.Target], quantize: str = "") -> Outline:
    """Describes what targets would train in a model, without computing anything.

    Args:
      model: a Flax module of `lorax.models`.
      targets: as for `lorax.init`.
      quantize: as `config.model.quantize`.

    Raises:
      ValueError: `lorax.init` refuses the targets, or `lorax.quantize` the rules.
    """
    shapes = hf.abstract(model)

    def call(params: Any, *inputs: Any) -> Any:
        return model.apply({"params": params}, *inputs)

    kernels = lorax.discover(call, shapes, *hf.example(model))
    found = lorax.describe(shapes, targets, kernels)
    rules = quantizing.rules(quantize)

    def start(key: jax.Array, params: Any) -> Any:
        adapters, base = lorax.init(key, params, targets, kernels)
        state = optax.adamw(1.0).init(adapters)
        return adapters, state, lorax.quantize(base, rules, kernels) if rules else base

    adapters, state, base = jax.eval_shape(start, jax.random.key(0), shapes)
    held = {"base": base, "adapters": adapters, "their gradient": adapters}
    return Outline(
        model.config.to_hf()["model_type"],
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        found,
        {name: _size(of) for name, of in {**held, "AdamW's state": state}.items()},
    )


def render(outline: Outline) -> str:
    """Returns an outline as text: a table of the leaves, and the memory."""
    sizes = [
        f"{name:<16}{value / 2**20:12,.2f} MiB"
        for name, value in outline.nbytes.items()
    ]
    return "\n".join(
        [
            f"{outline.kind}: {outline.parameters:,} parameters\n",
            f"{outline.found}\n",
            *sizes,
            "Activations come on top: `lorax plan` compiles a step and counts them.",
        ]
    )


def _size(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
