"""DeLoRA: normalised directions, with a trained bound on how far the kernel moves.

    W = W0 + diag(n) a diag(lam / (r |a_k| |b_k|)) b,      n_i = |W0[i, :]|

Each of the r terms has norm lam / r in units of the kernel's norms n, so lam bounds the
update, while a and b only give its direction. n_i is the norm of the frozen kernel over
the outputs of input i, as in PEFT.

References:
  Bini, Girrbach, Akata, Decoupling Angles and Strength in Low-rank Adaptation,
  arXiv:2503.18225.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from lorax.adapters import layout, making
from lorax.adapters.lora import standard_factors
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, TargetSpec

SMALLEST = 1e-4
"""Lower bound of |a_k| and |b_k|, as in PEFT, because b starts at zero."""


@register("delora")
@flax.struct.dataclass
class DeLoRA(Parametrisation):
    """Bounded low-rank update of one kernel, or of a stack of kernels.

    `Target.alpha` is the initial lam (times sqrt(r) with "rank_stabilized" scaling);
    PEFT's default is 15.

    Attributes:
      a: `[*batch, *in, rank]`.
      b: `[*batch, rank, *out]`.
      lam: `[*batch]`, the bound.
      axes: the leaf's in, out and batch axes.
      dropout: rate on the input of the adapter branch, in [0, 1).
      layers: the layers of the first batch axis that have factors; None for all.
    """

    a: jax.Array
    b: jax.Array
    lam: jax.Array
    axes: Axes = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)

    fields = {
        "a": Field("a", "batch in rank"),  # normalised, so decay would have no effect
        "b": Field("b", "batch rank out"),
        "lam": Field("lam", "batch", decays=True),
    }
    reads_kernel = True

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> DeLoRA:
        """Returns LoRA's a and b, and lam = scale * rank."""
        del shared
        _, _, batch = making.sizes(kernel, target)
        a, b = standard_factors(key, kernel, target)
        lam = jnp.full(batch, target.scale * target.rank, target.dtype)
        statics = making.statics(kernel, target)
        del statics["scale"]
        return cls(a, b, lam, **statics)

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns (n a, lam / (r |a| |b|) b), zero for layers without factors."""
        dtype, axes, n = layout.wide(self.a, self.b), self.axes, len(self.axes.batch)
        a, b = self.a.astype(dtype), self.b.astype(dtype)
        reads = tuple(range(n, n + len(axes.in_)))
        writes = tuple(range(n + 1, n + 1 + len(axes.out)))
        lengths = _norm(a, reads) * _norm(b, writes)  # [*batch, rank]
        size = self.lam.astype(dtype)[..., None] / (self.rank * lengths)
        b = jnp.expand_dims(size, writes) * b
        depth = layout.depth(kernel, axes)
        a, b = (layout.spread(f, self.layers, depth) for f in (a, b))
        return Factors(input_norms(kernel, axes)[..., None] * a, b)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The norm, but at least `SMALLEST`, below which its gradient is zero."""
    return jnp.sqrt(jnp.maximum(jnp.sum(x**2, axes), SMALLEST**2))


def input_norms(kernel: jax.Array, axes: Axes) -> jax.Array:
    """Returns the norm over the outputs for each input of a leaf: `[*batch, *in]`."""
    wide = kernel.astype(layout.wide(kernel)).transpose(axes.order)
    last = tuple(range(len(axes.batch) + len(axes.in_), wide.ndim))
    return jnp.sqrt(jnp.sum(wide**2, last))
