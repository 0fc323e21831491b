"""LoRA of the same model in other JAX libraries: `flax.nnx.LoRA`, and qwix's provider.

Each function turns an unscanned LoRA case into one of its library: the same weights,
factors and scale, with only the factors trained. Where a library leaves a choice, the
faster one is taken: `nnx` modules are split once, outside the jitted step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import programs

Named = dict[tuple[str, str], Any]


class Rival(NamedTuple):
    """A case of another library, and how to read a tree of its trained leaves."""

    case: programs.Case
    names: Callable[[Any], Named]


class LoraLinear(nnx.Module):
    """A linear layer with `nnx.LoRA` beside it, which has no scale of its own."""

    def __init__(
        self, inputs: int, features: int, shape: gpt2.Shape, rngs: nnx.Rngs
    ) -> None:
        """Makes both; `of_nnx` fills them."""
        self.base = nnx.Linear(inputs, features, rngs=rngs)
        self.lora = nnx.LoRA(inputs, shape.rank, features, rngs=rngs)
        self.scale = shape.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., in]` to `[..., features]`."""
        return self.base(x) + self.scale * self.lora(x)


class Block(nnx.Module):
    """`gpt2_shaped.Block`."""

    def __init__(self, shape: gpt2.Shape, rngs: nnx.Rngs) -> None:
        """Makes the layers."""
        width, hidden = shape.width, shape.hidden
        norm = functools.partial(
            nnx.LayerNorm, width, epsilon=1e-5, use_fast_variance=False, rngs=rngs
        )
        self.ln_1, self.ln_2, self.heads = norm(), norm(), shape.heads
        for name in gpt2.LINEARS:
            sizes = {"up": (width, hidden), "down": (hidden, width)}
            inputs, features = sizes.get(name, (width, width))
            setattr(self, name, LoraLinear(inputs, features, shape, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, time, width]` to the same."""
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        h = self.ln_1(x)
        q, k, v = (getattr(self, name)(h).reshape(split) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * split[-1] ** -0.5, k)
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        linear: Mapping[str, Any] = {name: getattr(self, name) for name in gpt2.LINEARS}
        x = x + linear["o"](mixed)
        h = jax.nn.gelu(linear["up"](self.ln_2(x)), approximate=True)
        return x + linear["down"](h)


class Gpt2(nnx.Module):
    """`gpt2_shaped.Gpt2`, not scanned."""

    def __init__(self, shape: gpt2.Shape, rngs: nnx.Rngs) -> None:
        """Makes the layers."""
        self.layers, width = shape.layers, shape.width
        self.wte = nnx.Embed(shape.vocabulary, width, rngs=rngs)
        self.wpe = nnx.Embed(shape.time, width, rngs=rngs)
        for i in range(shape.layers):
            setattr(self, f"h_{i}", Block(shape, rngs))
        self.ln_f = nnx.LayerNorm(
            width, epsilon=1e-5, use_fast_variance=False, rngs=rngs
        )
        self.head = nnx.Linear(width, shape.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `[batch, time]` to `[batch, time, vocabulary]`."""
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for i in range(self.layers):
            x = getattr(self, f"h_{i}")(x)
        return self.head(self.ln_f(x))


def of_nnx(case: programs.Case, shape: gpt2.Shape) -> Rival:
    """Builds the case with `flax.nnx.LoRA`."""
    model = nnx.eval_shape(lambda: Gpt2(shape, nnx.Rngs(0)))
    graph, lora, *others = nnx.split(model, nnx.LoRAParam, ...)
    given: dict[str, Any] = {}
    for path, leaf in traverse_util.flatten_dict(case.params, sep="/").items():
        owner, name = path.rsplit("/", 1)
        own = owner.split("/")[-1] in gpt2.LINEARS
        given[f"{owner}/base/{name}" if own else path] = leaf
    for path, adapter in case.trained.items():
        owner = path.removesuffix("/kernel")
        given[f"{owner}/lora/lora_a"] = adapter.a
        given[f"{owner}/lora/lora_b"] = adapter.b

    def filled(state: Any) -> Any:
        flat = nnx.to_flat_state(state)
        return nnx.from_flat_state(
            [(p, v.replace(given["/".join(map(str, p))])) for p, v in flat]
        )

    lora, rest = filled(lora), filled(others[0])

    def loss(lora: Any, params: Any, batch: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, lora, params)(batch[:, :-1])
        return gpt2.cross_entropy(logits, batch)

    def names(state: Any) -> Named:
        found = {}
        for path, leaf in nnx.to_flat_state(state):
            owner = "/".join(map(str, path[:-2]))
            found[f"{owner}/kernel", str(path[-1])[-1]] = np.asarray(leaf[...])
        return found

    return Rival(programs.Case(loss, lora, rest, case.tokens), names)


def of_qwix(case: programs.Case, shape: gpt2.Shape) -> Rival:
    """Builds the case with qwix's `LoraProvider`; ImportError without qwix."""
    import qwix

    linears = "|".join(gpt2.LINEARS)
    provider = qwix.LoraProvider(
        module_path=f"h_[0-9]+/({linears})", rank=shape.rank, alpha=shape.alpha
    )
    model = qwix.apply_lora_to_model(gpt2.Gpt2(shape), provider)
    factors = {}
    for path, adapter in case.trained.items():
        factors[f"{path}_lora_a"], factors[f"{path}_lora_b"] = adapter.a, adapter.b
    lora = traverse_util.unflatten_dict(factors, sep="/")

    def loss(lora: Any, params: Any, batch: jax.Array) -> jax.Array:
        flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(lora)
        both = {"params": traverse_util.unflatten_dict(flat)}
        return gpt2.cross_entropy(model.apply(both, batch[:, :-1]), batch)

    def names(tree: Any) -> Named:
        flat = traverse_util.flatten_dict(tree, sep="/")

        def split(path: str) -> tuple[str, str]:
            return (path[: -len("_lora_a")], path[-1])

        return {split(path): np.asarray(leaf) for path, leaf in flat.items()}

    return Rival(case._replace(loss=loss, trained=lora), names)


RIVALS: dict[str, Callable[[programs.Case, gpt2.Shape], Rival]] = {
    "flax.nnx.LoRA": of_nnx,
    "qwix": of_qwix,
}
