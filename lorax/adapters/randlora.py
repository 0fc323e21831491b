"""RandLoRA: a full-rank update, as a trained mixture of frozen random matrices.

    W = W0 + scale * sum_j B_j diag(lam_j) A diag(gamma_j),      j = 1 ... ceil(min / r)

with A `[r, min(in, out)]` and B_j `[max(in, out), r]` drawn once for all kernels (a
kernel uses the leading parts, as in PEFT), A being on the kernel's smaller side. The
sum has the kernel's full rank, so the product is not thin: for T tokens it would cost
5 T in out multiplications besides the kernel's own, while the merged kernel with its
dense gradient costs T in out + 2 max min^2. Merging is cheaper from
T = min(in, out) / 2 on, so `factors` is None and the kernel is merged, subject to
`on_merge`.

References:
  Albert et al., RandLoRA: Full-rank parameter-efficient fine-tuning of large models,
  arXiv:2502.00987.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from lorax.adapters import layout, making
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, TargetSpec

NAMES = {"small": "randlora/{}/small", "large": "randlora/{}/large"}
lent = functools.partial(making.lent, NAMES)
"""The frozen fields, and their names in `Base.frozen`, of one rank."""


@register("randlora")
@flax.struct.dataclass
class RandLora(Parametrisation):
    """Full-rank update of one kernel, or of a stack of kernels.

    A smaller `rank` has more bases and more trainable numbers. PEFT's defaults are rank
    32 and alpha 640, a scale of 20.

    Attributes:
      lam: `[*batch, rank, bases]`, initially zero.
      gamma: `[*batch, bases, min(in, out)]`, initially 1 / max(bases, min(in, out)).
      small: A, `[rank, narrowest side]`, frozen, in `Base.frozen`.
      large: all B_j, `[widest side, bases, rank]`, frozen, in `Base.frozen`.
      scale: the factor on the sum, alpha / rank.
      axes: the leaf's in, out and batch axes.
      layers: the layers of the first batch axis that are adapted; None for all.
      lent: the names of the frozen arrays.
    """

    lam: jax.Array
    gamma: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    small: jax.Array | None = None
    large: jax.Array | None = None
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    lent: tuple[tuple[str, str], ...] = flax.struct.field(pytree_node=False, default=())

    fields = {
        "lam": Field("lam", "batch rank bases", decays=True),
        "gamma": Field("gamma", "batch bases side", decays=True),
        "small": Field("small", "rank narrowest", frozen=True),
        "large": Field("large", "widest bases rank", frozen=True),
    }
    additive = True
    absorbs = "lam"
    drops = False

    @classmethod
    def shared(
        cls, key: jax.Array, chosen: Mapping[str, tuple[TargetSpec, KernelSpec]]
    ) -> dict[str, jax.Array]:
        """Returns A and B for every rank, uniform with unit variance, as in PEFT."""
        found = {}
        for rank, n, m, dtype in making.widest(chosen):
            keys = jax.random.split(jax.random.fold_in(key, rank))
            bases, root = -(-min(n, m) // rank), math.sqrt(3)
            shapes = (rank, min(n, m)), (max(n, m), bases, rank)
            names = (name for _, name in lent(rank))
            for name, k, shape in zip(names, keys, shapes, strict=True):
                found[name] = jax.random.uniform(k, shape, dtype, -root, root)
        return found

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> RandLora:
        """Returns lam = 0 and gamma = 1 / max(bases, min(in, out))."""
        del key
        in_, out, batch = making.sizes(kernel, target)
        side, rank = min(math.prod(in_), math.prod(out)), target.rank
        bases = -(-side // rank)
        names = lent(rank)
        statics = making.statics(kernel, target)
        del statics["dropout"]
        return cls(
            jnp.zeros((*batch, rank, bases), target.dtype),
            jnp.full((*batch, bases, side), 1 / max(bases, side), target.dtype),
            small=shared[names[0][1]],
            large=shared[names[1][1]],
            lent=names,
            **statics,
        )

    def _form(self, kernel: jax.Array) -> Factors:
        """The product of width rank x bases, zero for layers that are not adapted.

        PEFT orders the columns of B_j by base and rank, and the rows of the trained
        side by rank and base; since B is random, the method is the same.
        """
        assert self.small is not None and self.large is not None
        in_, out, batch = self.axes.sizes(kernel.shape)
        n, m, dtype = math.prod(in_), math.prod(out), layout.wide(self.lam)
        lam, gamma = self.lam.astype(dtype), self.gamma.astype(dtype)
        rank, bases = lam.shape[-2:]
        small = self.small[:, None, : min(n, m)].astype(dtype)
        thin = self.scale * lam[..., None] * small * gamma[..., None, :, :]
        thin = thin.reshape(*lam.shape[:-2], rank * bases, min(n, m))
        thin = layout.spread(thin, self.layers, layout.depth(kernel, self.axes))
        wide = self.large[: max(n, m), :bases].reshape(max(n, m), rank * bases)
        wide = jnp.broadcast_to(wide.astype(dtype), (*batch, *wide.shape))
        a, b = (thin.mT, wide.mT) if n <= m else (wide, thin)
        return Factors(a.reshape(*batch, *in_, -1), b.reshape(*batch, -1, *out))
