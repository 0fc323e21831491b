"""LoRA: a frozen kernel plus the product of two thin factors.

    W = W0 + scale * a @ b

`a` reads the input, `b` writes the output (PEFT's `lora_A.weight` is `a.T`). rsLoRA,
PiSSA, LoRA-GA and OLoRA share this parametrisation: they differ in `scale` and init.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from __future__ import annotations

from typing import ClassVar

import flax.struct
import jax

from lorax.adapters import layout
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
      moved_by: the init that moved a part of the kernel into the factors, with what the
        part depends on, such as "pissa(rank=8)": the adapter fits what was left of the
        kernel alone. None: it fits the kernel as it was given.
    """

    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    moved_by: str | None = flax.struct.field(pytree_node=False, default=None)

    roles: ClassVar[dict[str, str]] = {"a": "a", "b": "b"}

    @property
    def rank(self) -> int:
        """The width of the bottleneck."""
        return self.a.shape[-1]

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the factors fit a leaf of this shape and dtype."""
        shapes = [(self.a.shape, "ir"), (self.b.shape, "ro")]
        layout.check(path, leaf, self.axes, self.layers, self.rank, shapes)

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns (a, scale * b) over the whole stack, zero where no layer has factors.

        Args:
          kernel: the leaf; only its shape is read.

        Returns:
          `a: [*batch, *in, rank]` and `b: [*batch, rank, *out]`, in their own dtypes.
        """
        a, b = self.a, self.scale * self.b.astype(layout.wide(self.b))
        depth = layout.depth(kernel, self.axes)
        return Factors(*(layout.spread(f, self.layers, depth) for f in (a, b)))

    def delta(self, kernel: jax.Array) -> jax.Array:
        """Returns `scale * a @ b` in the leaf's layout and at least float32."""
        a, b, _ = self.factors(kernel)
        return layout.product(a, b, self.axes, kernel)

    def merge(self, kernel: jax.Array) -> jax.Array:
        """Returns `W0 + scale * a @ b`, rounded once to the kernel's dtype."""
        return layout.added(kernel, self.delta(kernel))
