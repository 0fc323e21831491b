"""LoRA: a frozen kernel plus the product of two thin factors.

    W = W0 + scale * a @ b

`a` reads the input, `b` writes the output (PEFT's `lora_A.weight` is `a.T`). rsLoRA,
PiSSA, LoRA-GA and OLoRA share this parametrisation: they differ in `scale` and init.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lorax.adapters import layout, making, pairs
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, TargetSpec


class FromFactors(Parametrisation):
    """The base of classes that can be made from any two factors a and b."""

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> Any:
        """Returns a ~ U(-1/sqrt(in), 1/sqrt(in)), b = 0; 0 and N(0, 1) for a lookup."""
        del shared
        return cls.from_factors(kernel, target, *standard_factors(key, kernel, target))

    @classmethod
    def from_factors(
        cls, kernel: KernelSpec, target: TargetSpec, a: jax.Array, b: jax.Array
    ) -> Any:
        """Returns the adapter made from factors of the stack, or of its chosen layers.

        Args:
          kernel: the leaf before any part of it moves into the adapter.
          target: gives the static fields and options.
          a: `[*batch, *in, rank]`, in axes flattened or not; cast to target.dtype.
          b: `[*batch, rank, *out]`, out axes flattened or not; cast to target.dtype.
        """
        a, b = making.unflatten(kernel, target, a, b)
        a, b = a.astype(target.dtype), b.astype(target.dtype)
        return cls.around(kernel, target, a, b)

    @classmethod
    def around(
        cls, kernel: KernelSpec, target: TargetSpec, a: jax.Array, b: jax.Array
    ) -> Any:
        """Returns the adapter with these a and b, keeping their shapes and dtypes."""
        made: Any = cls
        return made(a, b, **making.statics(kernel, target))

    @classmethod
    def from_triplets(
        cls,
        kernel: KernelSpec,
        target: TargetSpec,
        u: jax.Array,
        s: jax.Array,
        vt: jax.Array,
    ) -> Any:
        """Returns the adapter with `a b = u diag(s) vt`, see `pairs.balanced`."""
        return cls.from_factors(kernel, target, *pairs.balanced(u, s, vt))


@register("lora")
@flax.struct.dataclass
class Lora(FromFactors):
    """Low-rank update `scale * a @ b` of one kernel, or of a stack of kernels.

    Attributes:
      a: `[*batch, *in, rank]`.
      b: `[*batch, rank, *out]`.
      scale: the factor on the product, `alpha / rank` or `alpha / sqrt(rank)`.
      axes: the leaf's in, out and batch axes.
      dropout: rate on the input of the adapter branch, in [0, 1); an embedding lookup
        has no input to drop.
      layers: the layers of the first batch axis that have factors; None for all.
      moved_by: the init that moved a part of the kernel into the factors, with what
        that part depends on, such as "pissa(rank=8)"; the adapter then fits only the
        rest of the kernel. None if it fits the kernel as given.
    """

    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    moved_by: str | None = flax.struct.field(pytree_node=False, default=None)

    fields = {
        "a": Field("a", "batch in rank", decays=True, pair="b"),
        "b": Field("b", "batch rank out", decays=True, pair="a"),
    }
    additive = True
    padded = True
    absorbs = "b"
    sliced = "sliced_lora"

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns (a, scale * b) over the whole stack, zero for layers without factors.

        Args:
          kernel: the leaf; only its shape is read.

        Returns:
          `a: [*batch, *in, rank]` in its own dtype and `b: [*batch, rank, *out]` in at
          least float32.
        """
        a, b = self.a, self.scale * self.b.astype(layout.wide(self.b))
        depth = layout.depth(kernel, self.axes)
        a, b = (layout.spread(f, self.layers, depth) for f in (a, b))
        return Factors(a, b)

    def as_lora(self) -> Lora:
        """Returns the adapter itself."""
        return self


def standard_factors(
    key: jax.Array, kernel: KernelSpec, target: TargetSpec
) -> tuple[jax.Array, jax.Array]:
    """Returns LoRA's initial a and b, as in the reference implementation.

    Its `kaiming_uniform(a=sqrt(5))` amounts to U(-1/sqrt(in), 1/sqrt(in)). Embeddings
    are mirrored, with a = 0 and b ~ N(0, 1), as there and in PEFT.
    """
    in_, out, batch = making.sizes(kernel, target)
    a_shape, b_shape = (*batch, *in_, target.rank), (*batch, target.rank, *out)
    if kernel.op == "gather":
        a = jnp.zeros(a_shape, target.dtype)
        return a, jax.random.normal(key, b_shape, target.dtype)
    bound = 1 / math.sqrt(math.prod(in_))
    a = jax.random.uniform(key, a_shape, target.dtype, -bound, bound)
    return a, jnp.zeros(b_shape, target.dtype)
