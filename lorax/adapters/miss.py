"""MiSS: one small matrix, repeated down the inputs of the kernel.

    W = W0 + scale * expand(D),      expand(D)[i, :] = D[i mod r, :]

so the branch sums the input over its shards of r features and multiplies by D:

    y = x W0 + (sum over shards of x) D

Only D `[r, out]` trains; the reading factor is a constant of zeros and ones. If r does
not divide the inputs, the last shard is shorter, as in PEFT.

References:
  Kang, Yin, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
  Structure, arXiv:2409.15371.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from lorax.adapters import layout, making
from lorax.adapters.lora import Lora
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, TargetSpec


@register("miss")
@flax.struct.dataclass
class MiSS(Parametrisation):
    """Update `scale * expand(block)` of one kernel, or of a stack of kernels.

    The method has no alpha: `Target.alpha` is ignored, and `scale` is 1. PEFT's rank is
    64. Its variants "bat" and "mini" are not supported.

    Attributes:
      block: D, `[*batch, rank, *out]`.
      axes: the leaf's in, out and batch axes.
      scale: the factor on the update, 1.
      dropout: rate on the input of the adapter branch, in [0, 1).
      layers: the layers of the first batch axis that have a block; None for all.
      in_sizes: sizes of the leaf's in axes, which the block does not show; None if
        unknown, and then there is no Lora form.
    """

    block: jax.Array
    axes: Axes = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    in_sizes: tuple[int, ...] | None = flax.struct.field(
        pytree_node=False, default=None
    )

    fields = {"block": Field("block", "batch rank out", decays=True)}
    additive = True
    absorbs = "block"

    @classmethod
    def largest_rank(cls, in_: int, out: int) -> int:
        """Returns the number of inputs, at which there is a single shard."""
        del out
        return in_

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> MiSS:
        """Returns a block of zeros."""
        del key, shared
        in_, out, batch = making.sizes(kernel, target)
        block = jnp.zeros((*batch, target.rank, *out), target.dtype)
        own = {"scale": 1.0, "in_sizes": in_}
        return cls(block, **making.statics(kernel, target) | own)

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns the one-hot map from inputs to shard features, and scale * block."""
        in_, _, batch = self.axes.sizes(kernel.shape)
        b = self.scale * self.block.astype(layout.wide(self.block))
        a = jnp.broadcast_to(self._reads(in_), (*batch, *in_, self.rank))
        return Factors(
            a, layout.spread(b, self.layers, layout.depth(kernel, self.axes))
        )

    def as_lora(self) -> Lora | None:
        """Returns the Lora of the same rank, or None if `in_sizes` is unknown."""
        if self.in_sizes is None:
            return None
        batch = self.block.shape[: self.block.ndim - 1 - len(self.axes.out)]
        a = jnp.broadcast_to(
            self._reads(self.in_sizes), (*batch, *self.in_sizes, self.rank)
        )
        static = self.scale, self.axes, self.dropout, self.layers
        return Lora(a, self.block, *static)

    def _reads(self, in_: tuple[int, ...]) -> jax.Array:
        """The one-hot map `[*in, rank]`: input i is feature i mod r of its shard."""
        number = jnp.arange(math.prod(in_)) % self.rank
        return jax.nn.one_hot(number, self.rank, dtype=self.block.dtype).reshape(
            *in_, self.rank
        )
