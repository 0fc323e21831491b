"""DoRA: the direction of the adapted kernel, and a trained magnitude per output.

    W = (W0 + scale * a @ b) * m / c,      c = |W0 + scale * a @ b|

with the norm taken over the inputs of each output feature. It is computed from the
factors,

    c^2 = |W0|^2 + 2 s sum_r b * (a^T W0) + s^2 sum_r b * (a^T a b),

so no `[in, out]` product is formed. By default the gradient treats c as a constant
(section 4.3 of the paper, and what every released implementation does).

References:
  Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.adapters import layout, making
from lorax.adapters.lora import FromFactors
from lorax.adapters.parametrisation import register
from lorax.types import Axes, Factors, Field, KernelSpec, TargetSpec

CLAMP = 1e-12  # lower bound on c^2 / |W0|^2, as cancellation can make c^2 negative


@register("dora")
@flax.struct.dataclass
class Dora(FromFactors):
    """Low-rank change of a kernel's directions, with a trained norm per output.

    Attributes:
      a: `[*batch, *in, rank]`.
      b: `[*batch, rank, *out]`.
      magnitude: `[*batch, *out]`; float32. Do not apply weight decay or LoRA+'s ratio
        to it.
      scale: the factor on the product `a @ b`.
      axes: the leaf's in, out and batch axes.
      dropout: rate on the branch's input; the dropped input then also enters a second
        frozen product, in the rescaled part.
      layers: the layers of the first batch axis that have factors; None for all.
      detach_norm: True treats c as a constant in the gradient; False differentiates it.
      moved_by: the init that moved a part of the kernel into the factors, with what
        that part depends on, such as "pissa(rank=8)"; the adapter then fits only the
        rest of the kernel. None if it fits the kernel as given.
    """

    a: jax.Array
    b: jax.Array
    magnitude: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    detach_norm: bool = flax.struct.field(pytree_node=False, default=True)
    moved_by: str | None = flax.struct.field(pytree_node=False, default=None)

    fields = {
        "a": Field("a", "batch in rank", decays=True, pair="b"),
        "b": Field("b", "batch rank out", decays=True, pair="a"),
        "magnitude": Field("magnitude", "batch out"),
    }
    options = {"detach_norm": True}
    padded = True
    absorbs = "b"
    reads_kernel = True

    @classmethod
    def around(
        cls, kernel: KernelSpec, target: TargetSpec, a: jax.Array, b: jax.Array
    ) -> Dora:
        """Returns the adapter, with the kernel's norm as its magnitude."""
        statics = making.statics(kernel, target)
        norms = lambda kernel, axes: column_norm(kernel, None, None, axes)
        magnitude = making.read(kernel, target, norms)
        options = making.options(target, cls.options)
        return cls(a, b, magnitude, **statics, detach_norm=options["detach_norm"])

    def norm(self, kernel: jax.Array) -> jax.Array:
        """Returns c, the norm of every adapted column: `[*batch, *out]`, float32."""
        if self.layers is not None:
            kernel = layout.chosen(kernel, self.layers, self.axes.batch[0])
        return column_norm(kernel, self.a, self.scale * self.b, self.axes)

    def gain(self, kernel: jax.Array) -> jax.Array:
        """Returns `magnitude / c` for the layers that have factors."""
        norm = self.norm(kernel)
        return self.magnitude / (
            jax.lax.stop_gradient(norm) if self.detach_norm else norm
        )

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns (a, scale * b, gain) over the whole stack.

        Layers without factors stay unchanged.
        """
        b = self.scale * self.b.astype(layout.wide(self.b))
        depth = layout.depth(kernel, self.axes)
        return Factors(
            layout.spread(self.a, self.layers, depth),
            layout.spread(b, self.layers, depth),
            layout.spread(self.gain(kernel), self.layers, depth, fill=1.0),
        )


def column_norm(
    kernel: jax.Array,
    a: jax.Array | None,
    b: jax.Array | None,
    axes: Axes,
) -> jax.Array:
    """Returns the norm over the inputs of `kernel + a @ b`, without forming it.

    Args:
      kernel: the leaf.
      a: `[*batch, *in, rank]`; None for the norm of the kernel alone.
      b: `[*batch, rank, *out]`, with the scale folded in.
      axes: the leaf's axes.

    Returns:
      `[*batch, *out]` in at least float32, and at least `sqrt(CLAMP)` times the norm of
      the kernel alone.
    """
    dtype = layout.wide(kernel)
    kernel = kernel.astype(dtype)
    order = axes.batch + axes.out
    rest = [axis for axis in range(kernel.ndim) if axis not in axes.in_]
    own = jnp.sum(kernel**2, axes.in_).transpose([rest.index(axis) for axis in order])
    squared = own
    if a is not None and b is not None:
        n, i = len(axes.batch), len(axes.in_)
        a, b = a.astype(dtype), b.astype(dtype)
        batch, read = tuple(range(n)), tuple(range(n, n + i))
        dot = functools.partial(_explicit.dot, precision=linalg.EXACT)
        cross = dot(a, kernel, ((read, axes.in_), (batch, axes.batch)))
        gram = dot(a, a, ((read, read), (batch, batch)))  # [*batch, rank, rank]
        # `cross` has [*batch, rank, *out] with out in the leaf's order
        outs = sorted(axes.out)
        cross = cross.transpose(*batch, n, *(n + 1 + outs.index(d) for d in axes.out))
        second = dot(gram, b, (((n + 1,), (n,)), (batch, batch)))
        squared = own + jnp.sum(b * (2 * cross + second), axis=n)
    return jnp.sqrt(jnp.maximum(squared, CLAMP * own + jnp.finfo(dtype).tiny))
