"""LoRA-XS: a trained r x r core between the kernel's own singular vectors.

    W0 = U S V^T,      W = W0 + scale * (U_r S_r) R V_r^T

U_r S_r and V_r^T never train, so a kernel has r^2 trainable numbers, whatever its size,
and two moments for each. The paper draws R from N(0, 1e-5^2); here it starts at zero:
R's gradient does not depend on R, so R can still learn, and merging at init gives the
kernel exactly. `init="lora_sb"` uses the gradient's singular vectors instead.

References:
  Bałazy et al., LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters,
  arXiv:2405.17604; github.com/MohammadrezaBanaei/LoRA-XS.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.adapters import layout, making
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, TargetSpec


@register("lora_xs")
@flax.struct.dataclass
class LoraXs(Parametrisation):
    """Update `scale * a @ core @ b` with frozen a and b.

    Attributes:
      core: R, `[*batch, rank, rank]`.
      a: `[*batch, *in, rank]`, frozen, in `Base.frozen`.
      b: `[*batch, rank, *out]`, frozen, in `Base.frozen`.
      scale: the factor on the product, alpha / rank; the authors use alpha 16.
      axes: the leaf's in, out and batch axes.
      dropout: rate on the input of the adapter branch, in [0, 1).
      layers: the layers of the first batch axis that have factors; None for all.
      lent: the names of the frozen arrays.
    """

    core: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    a: jax.Array | None = None
    b: jax.Array | None = None
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    lent: tuple[tuple[str, str], ...] = flax.struct.field(pytree_node=False, default=())

    fields = {
        "core": Field("core", "batch rank rank", decays=True),
        "a": Field("reads", "batch in rank", frozen=True),
        "b": Field("writes", "batch rank out", frozen=True),
    }
    additive = True
    absorbs = "core"

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> LoraXs:
        """Returns the kernel's leading singular vectors, and a core of zeros."""
        del key, shared
        u, s, vt = linalg.svd(making.matrices(kernel, target), target.rank)
        core = jnp.zeros((*s.shape, target.rank), target.dtype)
        return cls.from_bases(kernel, target, u * s[..., None, :], core, vt)

    @classmethod
    def from_bases(
        cls,
        kernel: KernelSpec,
        target: TargetSpec,
        a: jax.Array,
        core: jax.Array,
        b: jax.Array,
    ) -> LoraXs:
        """Returns the adapter with the core between frozen bases.

        All arrays are cast to target.dtype; in and out axes may be flattened.

        Args:
          kernel: the leaf.
          target: gives the static fields.
          a: `[*batch, in, rank]`.
          core: `[*batch, rank, rank]`.
          b: `[*batch, rank, out]`.
        """
        a, b = making.unflatten(kernel, target, a, b)
        one, two = f"{kernel.path}/lora_xs/a", f"{kernel.path}/lora_xs/b"
        return cls(
            core.astype(target.dtype),
            a=a.astype(target.dtype),
            b=b.astype(target.dtype),
            lent=(("a", one), ("b", two)),
            **making.statics(kernel, target),
        )

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns (a, scale * core @ b), so that a gets no gradient."""
        assert self.a is not None and self.b is not None
        n = len(self.axes.batch)
        batch, dtype = tuple(range(n)), layout.wide(self.core)
        b = _explicit.dot(
            self.core.astype(dtype),
            self.b.astype(dtype),
            (((n + 1,), (n,)), (batch, batch)),
            jax.lax.Precision.HIGHEST,
        )
        depth = layout.depth(kernel, self.axes)
        a, b = (layout.spread(f, self.layers, depth) for f in (self.a, self.scale * b))
        return Factors(a, b)
