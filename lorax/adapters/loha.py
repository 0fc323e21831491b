"""LoHa: an update that is the elementwise product of two low-rank matrices.

    W = W0 + scale * (a1 b1) * (a2 b2)

which has rank up to r^2 with the parameters of rank 2 r. Row i of the update is a sum
over pairs of ranks, so it is also one thin product of width r^2 (Khatri-Rao):

    (a1 b1) * (a2 b2) = a b,   a[i, (k, l)] = a1[i, k] a2[i, l],   b likewise.

References:
  Hyeon-Woo, Ye-Bin, Oh, FedPara: Low-Rank Hadamard Product for Communication-Efficient
  Federated Learning, arXiv:2108.06098. Yeh et al., Navigating Text-To-Image
  Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv:2309.14859.
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


@register("loha")
@flax.struct.dataclass
class LoHa(Parametrisation):
    """Update `scale * (a1 @ b1) * (a2 @ b2)` of one kernel, or of a stack of kernels.

    The thin product has width r^2 and costs as much as LoRA of that rank. If r^2 is not
    below min(in, out), the kernel is merged, subject to `on_merge`.

    Attributes:
      a1: `[*batch, *in, rank]`.
      b1: `[*batch, rank, *out]`.
      a2: `[*batch, *in, rank]`.
      b2: `[*batch, rank, *out]`.
      scale: the factor on the product, alpha / rank.
      axes: the leaf's in, out and batch axes.
      dropout: rate on the input of the adapter branch, in [0, 1).
      layers: the layers of the first batch axis that have factors; None for all.
    """

    a1: jax.Array
    b1: jax.Array
    a2: jax.Array
    b2: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)

    fields = {
        "a1": Field("a1", "batch in rank", decays=True),
        "b1": Field("b1", "batch rank out", decays=True),
        "a2": Field("a2", "batch in rank", decays=True),
        "b2": Field("b2", "batch rank out", decays=True),
    }
    additive = True
    padded = True
    absorbs = "b1"

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> LoHa:
        """Returns a2 = 0, a1 ~ U(-1/sqrt(in), 1/sqrt(in)), b1, b2 ~ U(-1, 1)/sqrt(r).

        As in PEFT, following the paper's He initialisation; LyCORIS uses a normal one.
        """
        del shared
        in_, out, batch = making.sizes(kernel, target)
        rank, keys = target.rank, jax.random.split(key, 3)

        def uniform(key: jax.Array, shape: tuple[int, ...], fan: int) -> jax.Array:
            bound = 1 / math.sqrt(fan)
            return jax.random.uniform(key, shape, target.dtype, -bound, bound)

        reads, writes = (*batch, *in_, rank), (*batch, rank, *out)
        return cls(
            uniform(keys[0], reads, math.prod(in_)),
            uniform(keys[1], writes, rank),
            jnp.zeros(reads, target.dtype),
            uniform(keys[2], writes, rank),
            **making.statics(kernel, target),
        )

    def factors(self, kernel: jax.Array) -> Factors | None:
        """Returns the thin product of width r^2, or None if that is not thin."""
        in_, out, batch = self.axes.sizes(kernel.shape)
        if self.rank**2 >= min(math.prod(in_), math.prod(out)):
            return None
        return self._product(kernel)

    def _form(self, kernel: jax.Array) -> Factors:
        return self._product(kernel)

    def as_lora(self) -> Lora:
        """Returns the Lora of rank r^2 with the Khatri-Rao products as factors."""
        a, b = self._khatri_rao()
        return Lora(a, b, self.scale, self.axes, self.dropout, self.layers)

    def _product(self, kernel: jax.Array) -> Factors:
        """The Khatri-Rao products over the stack, zero for layers without factors."""
        (a, b), depth = self._khatri_rao(), layout.depth(kernel, self.axes)
        a, b = (layout.spread(f, self.layers, depth) for f in (a, self.scale * b))
        return Factors(a, b)

    def _khatri_rao(self) -> tuple[jax.Array, jax.Array]:
        """`[*batch, *in, r^2]` and `[*batch, r^2, *out]`, at least float32."""
        dtype, rank = layout.wide(self.a1, self.b1), self.rank
        a1, b1, a2, b2 = (x.astype(dtype) for x in (self.a1, self.b1, self.a2, self.b2))
        a = a1[..., :, None] * a2[..., None, :]
        a = a.reshape(*a1.shape[:-1], rank * rank)
        n = b1.ndim - len(self.axes.out) - 1  # of the batch
        b = jnp.expand_dims(b1, n + 1) * jnp.expand_dims(b2, n)
        return a, b.reshape(*b1.shape[:n], rank * rank, *b1.shape[n + 1 :])
