"""HRA: reflects the inputs of a kernel in r trained hyperplanes, one after another.

    W = R W0,      R = H_r ... H_2 H_1,      H_i = I - 2 u_i u_i^T / |u_i|^2

The product is orthogonal, and differs from the identity by a matrix of rank r: in
compact WY form, with the normalised u_i as the columns of U,

    H_1 H_2 ... H_r = I - U T U^T,      T^-1 = I / 2 + (the part of U^T U above its
                                               diagonal)

so x R costs two thin products. With `gram_schmidt` the u_i are orthonormalised first
(the paper's limit of a strong regulariser), and R = I - 2 U U^T.

At init the u_i are equal in pairs, so that each pair's reflections cancel; this takes
an even rank. With `gram_schmidt` no init cancels: I - 2 U U^T is never the identity,
and the second of two equal columns becomes rounding error. PEFT starts there
nevertheless; here such adapters can be loaded, but not made.

References:
  Yuan et al., Bridging The Gap between Low-rank and Orthogonal Adaptation via
  Householder Reflection Adaptation, arXiv:2405.17484.
  Puglisi, Modification of the Householder method based on the compact WY
  representation, SIAM J. Sci. Stat. Comput. 13 (1992).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from lorax import _explicit, _lapack, linalg
from lorax.adapters import layout, making
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, LinearMap, TargetSpec


@register("hra")
@flax.struct.dataclass
class Hra(Parametrisation):
    """Householder reflections of a kernel's inputs, its in axes flattened.

    Attributes:
      u: `[*batch, *in, rank]`, the hyperplanes' normals, of any length.
      axes: the leaf's in, out and batch axes.
      layers: the layers of the first batch axis that are reflected; None for all.
      gram_schmidt: True orthonormalises the normals, in their order.
    """

    u: jax.Array
    axes: Axes = flax.struct.field(pytree_node=False)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    gram_schmidt: bool = flax.struct.field(pytree_node=False, default=False)

    fields = {"u": Field("u", "batch in rank")}
    options = {"gram_schmidt": False}
    drops = False

    @classmethod
    def check_target(cls, target: TargetSpec) -> None:
        """Raises ValueError for options without an init at which nothing changes."""
        given = making.options(target, cls.options)["gram_schmidt"]
        if not isinstance(given, bool):
            raise ValueError(
                f"{target.pattern!r}: gram_schmidt={given!r} for adapter='hra'; give "
                "True or False"
            )
        if given:
            raise ValueError(
                f"{target.pattern!r}: gram_schmidt=True for adapter='hra' has no init "
                "that leaves the kernel unchanged: I - 2 U U^T is never the identity; "
                "start without it, or load an adapter that has it "
                "(lorax.interop.peft.load, or Hra(u, axes, gram_schmidt=True))"
            )
        if target.rank % 2:
            raise ValueError(
                f"{target.pattern!r}: rank={target.rank} for adapter='hra'; give an "
                "even rank, so that the reflections cancel in pairs at init"
            )

    @classmethod
    def largest_rank(cls, in_: int, out: int) -> int:
        """Returns the number of inputs: that many reflections give any rotation."""
        del out
        return in_

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> Hra:
        """Returns pairs of equal normals, U(-s, s) with s = sqrt(2 / rank) as in PEFT.

        Raises:
          ValueError: the kernel is an embedding lookup.
        """
        del shared
        making.require_inputs(kernel, "hra")
        in_, _, batch = making.sizes(kernel, target)
        bound = math.sqrt(2 / target.rank)
        shape = (*batch, *in_, target.rank // 2)
        half = jax.random.uniform(key, shape, target.dtype, -bound, bound)
        return cls(jnp.repeat(half, 2, axis=-1), kernel.linear_axes(), target.layers)

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns the map D = R - I on the inputs, as two thin factors."""
        thin = _explicit.automatic(self._thin, (self.u,), None)
        depth = layout.depth(kernel, self.axes)
        thin = tuple(layout.spread(part, self.layers, depth) for part in thin)
        return layout.without_product(
            kernel, self.axes, inputs=LinearMap(thin, reflected)
        )

    def _thin(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`-U T^T: [*batch, in, rank]` and `U^T: [*batch, rank, in]`."""
        batch, rank = u.shape[: len(self.axes.batch)], u.shape[-1]
        u = u.astype(layout.wide(u)).reshape(*batch, -1, rank)
        if self.gram_schmidt:
            u, _ = _lapack.qr(u)  # its columns up to sign
            return -2 * u, u.mT
        u = normalised(u)
        middle = jnp.triu(linalg.dot(u.mT, u), 1) + jnp.eye(rank, dtype=u.dtype) / 2
        return -linalg.dot(u, _lapack.inverse(middle).mT), u.mT


def reflected(thin: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    """Returns x D for a thin D and x `[n, in]`."""
    return (x @ thin[0]) @ thin[1]


def normalised(u: jax.Array) -> jax.Array:
    """Returns unit columns; a zero column stays zero and gets no gradient."""
    squared = jnp.sum(u**2, axis=-2, keepdims=True)
    return u * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0))
