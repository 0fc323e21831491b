"""OFT: rotates the inputs of a frozen kernel by orthogonal blocks.

    W = R W0,      R = diag(R_1, ..., R_k),      R_i = (I + Q_i) (I - Q_i)^-1

Q_i is skew-symmetric, `[block_size, block_size]`, and its entries above the diagonal
train: the Cayley transform of any such Q_i is orthogonal. OFTv2 rotates the activation
instead of the kernel, `y = (x R) W0`, and replaces the inverse by the Neumann series

    R_i = I + 2 Q_i + 2 Q_i^2 + ... + 2 Q_i^(t-2) + Q_i^(t-1)         (t = cayley_terms)

which is orthogonal to order `|Q|^t`. Both are done here; the program computes
`x + x D` with D = R - I, which keeps full precision for small rotations.

Constrained OFT keeps `|Q_i| <= eps / sqrt(k)` (Frobenius) by scaling larger Q_i down to
the bound. PEFT overwrites the parameters with the scaled ones at every forward pass;
here the scaling is part of the function, and its gradient has no component along Q_i.

PEFT's exact form (`use_cayley_neumann=False`) is the transform of -Q, its series that
of Q. Here both are of Q, as in the papers; `lorax.interop.peft` flips the sign.

References:
  Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning,
  arXiv:2306.07280.
  Qiu et al., Orthogonal Finetuning Made Scalable, arXiv:2506.19847 (OFTv2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lorax import _checks, _explicit, _lapack, linalg
from lorax.adapters import layout, making
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, LinearMap, TargetSpec

OPTIONS = {
    "block_size": 32,  # PEFT's oft_block_size
    "cayley_terms": 5,  # PEFT's num_cayley_neumann_terms
    "coft": False,
    "eps": 6e-5,  # PEFT's, used by coft only
    "block_share": False,
}


@register("oft")
@flax.struct.dataclass
class Oft(Parametrisation):
    """Block-diagonal rotation of a kernel's inputs, its in axes flattened.

    Attributes:
      skew: `[*batch, blocks, block_size (block_size - 1) / 2]`, the entries of each Q_i
        above its diagonal, row by row; a single block if it is shared.
      axes: the leaf's in, out and batch axes.
      layers: the layers of the first batch axis that are rotated; None for all.
      cayley_terms: t, at least 2; None for the exact inverse.
      eps: bound of constrained OFT; None if unconstrained.
    """

    skew: jax.Array
    axes: Axes = flax.struct.field(pytree_node=False)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    cayley_terms: int | None = flax.struct.field(pytree_node=False, default=5)
    eps: float | None = flax.struct.field(pytree_node=False, default=None)

    fields = {"skew": Field("skew", "batch blocks entries", decays=True)}
    options = OPTIONS
    drops = False

    @classmethod
    def check_target(cls, target: TargetSpec) -> None:
        """Raises ValueError for options out of range."""
        given = making.options(target, OPTIONS)
        size, terms, eps = (given[n] for n in ("block_size", "cayley_terms", "eps"))

        def other(name: str, want: str) -> ValueError:
            told = f"{target.pattern!r}: {name}={given[name]!r} for adapter='oft'"
            return ValueError(f"{told}; give {want}")

        if not _checks.is_whole(size) or size < 2:
            raise other("block_size", "a whole number >= 2 that divides the inputs")
        if terms is not None and (not _checks.is_whole(terms) or terms < 2):
            raise other("cayley_terms", "a whole number >= 2, or None for the inverse")
        if not _checks.is_real(eps) or not eps > 0:
            raise other("eps", "a number > 0, the bound of coft")
        for name in ("coft", "block_share"):
            if not isinstance(given[name], bool):
                raise other(name, "True or False")

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> Oft:
        """Returns Q = 0: no rotation.

        Raises:
          ValueError: block_size does not divide the inputs, or the kernel is an
            embedding lookup.
        """
        del key, shared
        making.require_inputs(kernel, "oft")
        given = making.options(target, OPTIONS)
        in_, _, batch = making.sizes(kernel, target)
        n, size = math.prod(in_), given["block_size"]
        if n % size:
            near = [d for d in range(2, n + 1) if n % d == 0]
            near = sorted(sorted(near, key=lambda d: abs(d - size))[:4])
            raise ValueError(
                f"{kernel.path}: block_size={size} does not divide the {n} inputs; "
                f"give options={{'block_size': ...}}, such as {near}"
            )
        blocks = 1 if given["block_share"] else n // size
        return cls(
            jnp.zeros((*batch, blocks, size * (size - 1) // 2), target.dtype),
            kernel.linear_axes(),
            target.layers,
            given["cayley_terms"],
            given["eps"] if given["coft"] else None,
        )

    @property
    def block_size(self) -> int:
        """The width of a block, from the number b (b - 1) / 2 of its entries."""
        return (1 + math.isqrt(1 + 8 * self.skew.shape[-1])) // 2

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the blocks fit the leaf's inputs."""
        layout.check(path, self, leaf)
        n = math.prod(self.axes.sizes(leaf.shape)[0])
        blocks, entries = self.skew.shape[-2:]
        size = self.block_size
        whole = size * (size - 1) // 2 == entries
        if not whole or blocks * size != n and (blocks != 1 or n % size):
            raise ValueError(
                f"{path}: {blocks} blocks of {entries} entries do not fit {n} inputs; "
                "was the adapter made for another model?"
            )

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns the map D = R - I on the inputs, block by block."""
        blocks = _explicit.automatic(self._change, (self.skew,), None)
        blocks = layout.spread(blocks, self.layers, layout.depth(kernel, self.axes))
        return layout.without_product(
            kernel, self.axes, inputs=LinearMap(blocks, turned)
        )

    def _change(self, skew: jax.Array) -> jax.Array:
        """D for every block: `[*batch, blocks, block_size, block_size]`."""
        skew = skew.astype(layout.wide(skew))
        if self.eps is not None:
            skew = bounded(skew, self.eps / math.sqrt(skew.shape[-2]))
        return cayley(skew_symmetric(skew, self.block_size), self.cayley_terms)


def turned(blocks: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x D for a block-diagonal D.

    Args:
      blocks: `[blocks, b, b]`; a single block acts on all parts of x.
      x: `[n, in]`.
    """
    count, size = blocks.shape[:2]
    if count == 1:
        return (x.reshape(-1, size) @ blocks[0]).reshape(x.shape)
    parts = x.reshape(x.shape[0], count, size)
    return jnp.einsum("nkb,kbc->nkc", parts, blocks).reshape(x.shape)


def skew_symmetric(entries: jax.Array, size: int) -> jax.Array:
    """Returns Q `[..., size, size]` with these entries above its diagonal, by row."""
    rows, columns = np.triu_indices(size, 1)
    place = np.full((size, size), rows.size)  # diagonal: the zero after the entries
    place[rows, columns] = place[columns, rows] = np.arange(rows.size)
    sign = np.sign(np.arange(size)[None] - np.arange(size)[:, None])
    entries = jnp.pad(entries, [(0, 0)] * (entries.ndim - 1) + [(0, 1)])
    return entries[..., place] * sign.astype(entries.dtype)


def cayley(q: jax.Array, terms: int | None) -> jax.Array:
    """Returns D = (I + Q) (I - Q)^-1 - I = 2 Q (I - Q)^-1, or the sum of its series.

    Args:
      q: `[..., b, b]`, skew-symmetric, so that I - Q is invertible.
      terms: number of terms of the series, counting I; None for the exact inverse.
    """
    if terms is None:
        return 2 * linalg.dot(
            q, _lapack.inverse(jnp.eye(q.shape[-1], dtype=q.dtype) - q)
        )
    power, change = q, jnp.zeros_like(q)
    for _ in range(terms - 2):
        change, power = change + 2 * power, linalg.dot(power, q)
    return change + power


def bounded(entries: jax.Array, bound: float) -> jax.Array:
    """Returns the entries, scaled down where |Q|_F = sqrt(2) |entries| > bound."""
    squared = 2 * jnp.sum(entries**2, axis=-1, keepdims=True)
    outside = squared > bound**2
    norm = jnp.sqrt(jnp.where(outside, squared, 1.0))  # avoids the gradient of sqrt(0)
    return jnp.where(outside, entries * (bound / norm), entries)
