"""LoRA on some slices of a fused kernel, such as q and v of a kernel for q, k and v.

    W[:, s] = W0[:, s] + scale * a_s @ b_s        for s in slices, others frozen

Each slice has its own pair, so the fused kernel's update has rank
`len(slices) * rank`, with zeros where a pair does not write. This is loralib's
`MergedLinear`, as in the GPT-2 runs of the LoRA paper.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685;
  github.com/microsoft/LoRA.
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


@register("sliced_lora")
@flax.struct.dataclass
class SlicedLora(Parametrisation):
    """Low-rank updates of slices of a kernel, along the first of its out axes.

    Attributes:
      a: `[*batch, slices, *in, rank]`.
      b: `[*batch, slices, rank, *out[1:]]`.
      scale: the factor on the products.
      axes: the leaf's in, out and batch axes.
      slices: which of the `blocks` slices have factors, increasing.
      blocks: the size of the first out axis.
      dropout: rate on the input of the adapter branch, in [0, 1); one draw for all
        slices.
      layers: the layers of the first batch axis that have factors; None for all.
    """

    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    slices: tuple[int, ...] = flax.struct.field(pytree_node=False)
    blocks: int = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)

    fields = {
        "a": Field("a", "batch slices in rank", decays=True, pair="b"),
        "b": Field("b", "batch slices rank out[1:]", decays=True, pair="a"),
    }
    additive = True
    padded = True
    absorbs = "b"
    sliced = "sliced_lora"

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> SlicedLora:
        """Returns LoRA's initial factors for every slice."""
        del shared
        in_, out, batch = making.sizes(kernel, target)
        assert target.slices is not None
        count, rank = len(target.slices), target.rank
        bound, a = 1 / math.sqrt(math.prod(in_)), (*batch, count, *in_, rank)
        own = {"slices": target.slices, "blocks": out[0]}
        return cls(
            jax.random.uniform(key, a, target.dtype, -bound, bound),
            jnp.zeros((*batch, count, rank, *out[1:]), target.dtype),
            **making.statics(kernel, target) | own,
        )

    def fused(self) -> Lora:
        """Returns the same update as one Lora of the summed rank, with zeros in b."""
        n = layout.stack_axes(self.a, self.axes) - 1  # of the batch
        count, rank = len(self.slices), self.rank
        out = self.b.shape[n + 2 :]
        a = jnp.moveaxis(self.a, n, -2)  # [*batch, *in, slices, rank]
        a = a.reshape(*a.shape[:-2], count * rank)
        b = jnp.moveaxis(self.b, (n, n + 1), (0, 1))  # [slices, rank, *batch, *out]
        own = jnp.asarray(self.slices)[:, None] == jnp.arange(self.blocks)
        own = own.reshape(count, 1, self.blocks, *[1] * (b.ndim - 2))
        whole = jnp.where(own, b[:, :, None], jnp.zeros((), b.dtype))
        whole = jnp.moveaxis(whole, (0, 1, 2), (n, n + 1, n + 2))
        b = whole.reshape(*self.b.shape[:n], count * rank, self.blocks, *out)
        return Lora(a, b, self.scale, self.axes, self.dropout, self.layers)

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the factors fit a leaf of this shape and dtype."""
        size = leaf.shape[self.axes.out[0]] if max(self.axes.out) < leaf.ndim else None
        if size != self.blocks:
            raise ValueError(
                f"{path}: the adapter has slices {self.slices} of {self.blocks}, but "
                f"the leaf has shape {leaf.shape}; was it made for another model?"
            )
        jax.eval_shape(lambda adapter: adapter.fused().check(path, leaf), self)

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns the factors of the fused kernel, `a` and `scale * b`."""
        return self.fused().factors(kernel)

    def as_lora(self) -> Lora:
        """Returns `fused()`."""
        return self.fused()
