"""VeRA: random projections shared by all kernels, and two trained vectors for each.

    W = W0 + A diag(d) B diag(b)

A and B are drawn once for all kernels of one rank, at the largest sizes among them, and
never train; a kernel `[in, out]` uses the leading rows of A and columns of B, as in
PEFT. d is folded into the writing side, so A gets no gradient at all.

References:
  Kopiczko, Blankevoort, Asano, VeRA: Vector-based Random Matrix Adaptation,
  arXiv:2310.11454.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from lorax import _checks
from lorax.adapters import layout, making
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, TargetSpec

NAMES = {"reads": "vera/{}/reads", "writes": "vera/{}/writes"}
lent = functools.partial(making.lent, NAMES)
"""The frozen fields, and their names in `Base.frozen`, of one rank."""


@register("vera")
@flax.struct.dataclass
class VeRA(Parametrisation):
    """Update `scale * A diag(d) B diag(b)` with frozen A and B.

    The method has no alpha: `Target.alpha` is ignored, and `scale` is 1. Ranks are
    larger than LoRA's: 256 in PEFT, up to 1024 in the paper.

    Attributes:
      d: `[*batch, rank]`, initially `d_initial`.
      b: `[*batch, *out]`, initially zero.
      reads: A, `[widest in, rank]`, frozen, in `Base.frozen`.
      writes: B, `[rank, widest out]`, frozen, in `Base.frozen`.
      axes: the leaf's in, out and batch axes.
      scale: the factor on the update, 1.
      dropout: rate on the input of the adapter branch, in [0, 1).
      layers: the layers of the first batch axis that have factors; None for all.
      lent: the names of the frozen arrays.
    """

    d: jax.Array
    b: jax.Array
    axes: Axes = flax.struct.field(pytree_node=False)
    reads: jax.Array | None = None
    writes: jax.Array | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    lent: tuple[tuple[str, str], ...] = flax.struct.field(pytree_node=False, default=())

    fields = {
        "d": Field("d", "batch rank", decays=True),
        "b": Field("gain", "batch out", decays=True),
        "reads": Field("reads", "widest_in rank", frozen=True),
        "writes": Field("writes", "rank widest_out", frozen=True),
    }
    options = {"d_initial": 0.1}
    additive = True
    absorbs = "b"

    @classmethod
    def check_target(cls, target: TargetSpec) -> None:
        """Raises ValueError for a `d_initial` that is zero or not a number."""
        given = making.options(target, cls.options)["d_initial"]
        if not _checks.is_finite(given) or not given:
            raise ValueError(
                f"{target.pattern!r}: d_initial={given!r}; give a number other than 0 "
                "(0.1 in the paper): with d and b both zero, nothing would train"
            )

    @classmethod
    def largest_rank(cls, in_: int, out: int) -> None:
        """Returns None: nothing bounds the rank of shared projections."""
        del in_, out

    @classmethod
    def shared(
        cls, key: jax.Array, chosen: Mapping[str, tuple[TargetSpec, KernelSpec]]
    ) -> dict[str, jax.Array]:
        """Returns A ~ U(-1, 1) sqrt(6 / in) and B ~ U(-1, 1) sqrt(6 / rank) by rank.

        This is He's uniform init, as in the paper and PEFT; `in` is the widest.
        """
        found = {}
        for rank, n, m, dtype in making.widest(chosen):
            keys = jax.random.split(jax.random.fold_in(key, rank))
            shapes, bounds = ((n, rank), (rank, m)), (6 / n, 6 / rank)
            names = (name for _, name in lent(rank))
            for name, k, shape, bound in zip(names, keys, shapes, bounds, strict=True):
                root = math.sqrt(bound)
                found[name] = jax.random.uniform(k, shape, dtype, -root, root)
        return found

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> VeRA:
        """Returns d = `d_initial` and b = 0."""
        del key
        _, out, batch = making.sizes(kernel, target)
        d = making.options(target, cls.options)["d_initial"]
        names = lent(target.rank)
        statics = making.statics(kernel, target) | {"scale": 1.0}
        return cls(
            jnp.full((*batch, target.rank), d, target.dtype),
            jnp.zeros((*batch, *out), target.dtype),
            reads=shared[names[0][1]],
            writes=shared[names[1][1]],
            lent=names,
            **statics,
        )

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns (A, diag(d) B diag(b)), zero for layers without vectors."""
        assert self.reads is not None and self.writes is not None
        in_, out, batch = self.axes.sizes(kernel.shape)
        dtype, rank = layout.wide(self.b), self.rank
        a = self.reads[: math.prod(in_)].reshape(*in_, rank)
        columns = self.writes[:, : math.prod(out)].reshape(rank, *out).astype(dtype)
        n = len(batch)
        d = self.d.astype(dtype).reshape(*self.d.shape, *[1] * len(out))
        b = self.scale * d * columns * jnp.expand_dims(self.b.astype(dtype), n)
        a = jnp.broadcast_to(a, (*batch, *a.shape))
        return Factors(
            a, layout.spread(b, self.layers, layout.depth(kernel, self.axes))
        )
