"""LoRA: a frozen kernel plus the product of two thin factors.

    W = W0 + scale * a @ b

`a` reads the input, `b` writes the output (PEFT's `lora_A.weight` is `a.T`). rsLoRA,
PiSSA, LoRA-GA and OLoRA share this parametrisation: they differ in `scale` and init.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from lorax.types import Axes, Factors


@flax.struct.dataclass
class Lora:
    """Low-rank update `scale * a @ b` of one kernel, or of a stack of kernels.

    Attributes:
      a: `[*batch, *in, rank]`.
      b: `[*batch, rank, *out]`.
      scale: the factor on the product, `alpha / rank` or `alpha / sqrt(rank)`.
      axes: the leaf's in, out and batch axes.
      dropout: rate on the input of the adapter branch, in [0, 1); an embedding lookup
        has no input to drop.
      layers: the layers of the first batch axis that have factors; None for all.
    """

    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)

    roles: ClassVar[dict[str, str]] = {"a": "a", "b": "b"}

    @property
    def rank(self) -> int:
        """The width of the bottleneck."""
        return self.a.shape[-1]

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the factors fit a leaf of this shape and dtype."""
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{path}: the leaf has dtype {leaf.dtype}, and a low-rank update needs "
                "a floating kernel; dequantise it or adapt another leaf"
            )
        if sorted(self.axes.order) != list(range(leaf.ndim)):
            raise ValueError(
                f"{path}: the adapter has {self.axes} and the leaf the shape "
                f"{leaf.shape}; was it made for another model?"
            )
        in_, out, batch = self.axes.sizes(leaf.shape)
        if self.layers is not None:
            if not batch or max(self.layers) >= batch[0]:
                raise ValueError(
                    f"{path}: layers={self.layers} of a leaf with shape {leaf.shape} "
                    f"and {self.axes}; no such layers"
                )
            batch = (len(self.layers), *batch[1:])
        want = (*batch, *in_, self.rank), (*batch, self.rank, *out)
        if (self.a.shape, self.b.shape) != want:
            raise ValueError(
                f"{path}: the factors have shapes {self.a.shape} and {self.b.shape}, "
                f"and a kernel of shape {leaf.shape} needs {want[0]} and {want[1]}; "
                "was the adapter made for another model?"
            )

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns (a, scale * b) over the whole stack, zero where no layer has factors.

        Args:
          kernel: the leaf; only its shape is read.

        Returns:
          `a: [*batch, *in, rank]` and `b: [*batch, rank, *out]`, in their own dtypes.
        """
        wide = jnp.promote_types(self.b.dtype, jnp.float32)
        a, b = self.a, self.scale * self.b.astype(wide)
        if self.layers is None:
            return Factors(a, b)
        layers = jnp.asarray(self.layers)
        depth = kernel.shape[self.axes.batch[0]]
        spread = lambda f: jnp.zeros((depth, *f.shape[1:]), f.dtype).at[layers].set(f)
        return Factors(spread(a), spread(b))

    def delta(self, kernel: jax.Array) -> jax.Array:
        """Returns `scale * a @ b` in the leaf's layout and at least float32."""
        a, b = self.factors(kernel)
        in_, out, batch = self.axes.sizes(kernel.shape)
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)
        product = jnp.matmul(
            a.astype(dtype).reshape(*batch, math.prod(in_), self.rank),
            b.astype(dtype).reshape(*batch, self.rank, math.prod(out)),
            precision=jax.lax.Precision.HIGHEST,
        ).reshape(*batch, *in_, *out)
        return product.transpose(_inverse(self.axes.order))

    def merge(self, kernel: jax.Array) -> jax.Array:
        """Returns `W0 + scale * a @ b`, rounded once to the kernel's dtype."""
        delta = self.delta(kernel)
        return (kernel.astype(delta.dtype) + delta).astype(kernel.dtype)


def _inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(permutation.index(i) for i in range(len(permutation)))
