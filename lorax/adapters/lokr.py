"""LoKr: the update is a Kronecker product of two small matrices, each full or thin.

    W = W0 + scale * w1 (x) w2,      w1: [m, p],  w2: [n, k],  m n = in,  p k = out

w2 is the product `w2_a w2_b` if the rank is below half of its longer side, and so is w1
if `decompose_both` is set. The Kronecker product is never formed: with x as
`[tokens, m, n]`,

    y[t, p k] = scale * sum_mn x[t, m, n] w1[m, p] w2[n, k]

is two small contractions. m and p are chosen as in LyCORIS and PEFT: `factor` if it
divides the size, else the largest divisor below it or (always with factor = -1) up to
the square root.

References:
  Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
  Evaluation, arXiv:2309.14859.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lorax.adapters import layout, making
from lorax.adapters.lora import Lora
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, LinearMap, TargetSpec

OPTIONS = {
    "factor": -1,  # PEFT's decompose_factor
    "decompose_both": False,  # PEFT's
}
Sides = tuple[tuple[int, int], tuple[int, int]]
"""((m, p), (n, k)): inputs and outputs of w1, and of w2."""


@register("lokr")
@flax.struct.dataclass
class LoKr(Parametrisation):
    """Update `scale * w1 (x) w2` of one kernel, or of a stack of kernels.

    Either w1, or w1_a and w1_b, and the same for w2; the others are None.

    Attributes:
      scale: the factor on the product, `alpha / rank`.
      axes: the leaf's in, out and batch axes; in and out are flattened.
      w1: `[*batch, m, p]`.
      w1_a: `[*batch, m, rank]`.
      w1_b: `[*batch, rank, p]`.
      w2: `[*batch, n, k]`.
      w2_a: `[*batch, n, rank]`.
      w2_b: `[*batch, rank, k]`.
      dropout: rate on the input of the adapter branch, in [0, 1).
      layers: the layers of the first batch axis that have factors; None for all.
      factor: how the sizes were chosen, kept for PEFT's config; otherwise unused.
      decompose_both: whether w1 could be a product, kept for the same reason.
      in_sizes: sizes of the leaf's in axes, whose product is m n; None if unknown, and
        then there is no Lora form.
      out_sizes: sizes of the leaf's out axes, whose product is p k, or None.
    """

    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    w1: jax.Array | None = None
    w1_a: jax.Array | None = None
    w1_b: jax.Array | None = None
    w2: jax.Array | None = None
    w2_a: jax.Array | None = None
    w2_b: jax.Array | None = None
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    factor: int = flax.struct.field(pytree_node=False, default=-1)
    decompose_both: bool = flax.struct.field(pytree_node=False, default=False)
    in_sizes: tuple[int, ...] | None = flax.struct.field(
        pytree_node=False, default=None
    )
    out_sizes: tuple[int, ...] | None = flax.struct.field(
        pytree_node=False, default=None
    )

    fields = {
        "w1": Field("w1", "batch in1 out1", decays=True, optional=True),
        "w1_a": Field("w1_a", "batch in1 rank", decays=True, optional=True),
        "w1_b": Field("w1_b", "batch rank out1", decays=True, optional=True),
        "w2": Field("w2", "batch in2 out2", decays=True, optional=True),
        "w2_a": Field("w2_a", "batch in2 rank", decays=True, optional=True),
        "w2_b": Field("w2_b", "batch rank out2", decays=True, optional=True),
    }
    options = OPTIONS
    additive = True
    padded = False  # padding w2's rank would change no update, but w1 may have no rank

    @classmethod
    def check_target(cls, target: TargetSpec) -> None:
        """Raises ValueError for options out of range."""
        given = making.options(target, OPTIONS)
        factor, both = given["factor"], given["decompose_both"]
        whole = isinstance(factor, int) and not isinstance(factor, bool)
        if not whole or (factor < 1 and factor != -1):
            raise ValueError(
                f"{target.pattern!r}: factor={factor!r} for adapter='lokr'; give a "
                "whole number >= 1, or -1 for the divisor nearest the square root"
            )
        if not isinstance(both, bool):
            raise ValueError(
                f"{target.pattern!r}: decompose_both={both!r} for adapter='lokr'; give "
                "True or False"
            )

    @classmethod
    def largest_rank(cls, in_: int, out: int) -> None:
        """Returns None: at ranks from half its longer side, a matrix is stored full."""
        del in_, out

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> LoKr:
        """Returns w1 = 0 (or w1_b = 0, if w1 is a product), others uniform, as in PEFT.

        Raises:
          ValueError: the kernel is an embedding lookup.
        """
        del shared
        making.require_inputs(kernel, "lokr")
        in_, out, batch = making.sizes(kernel, target)
        given = making.options(target, OPTIONS)
        (m, n), (p, k) = (split(math.prod(s), given["factor"]) for s in (in_, out))
        rank, dtype = target.rank, target.dtype
        keys = iter(jax.random.split(key, 3))

        def uniform(reads: int, writes: int) -> jax.Array:
            """The bound comes from the number of inputs, torch's fan_in."""
            bound, shape = 1 / math.sqrt(reads), (*batch, reads, writes)
            return jax.random.uniform(next(keys), shape, dtype, -bound, bound)

        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros((*batch, *shape), dtype)

        arrays: dict[str, Any] = {}
        if given["decompose_both"] and rank < max(p, m) / 2:
            arrays |= {"w1_a": uniform(m, rank), "w1_b": zeros(rank, p)}
        else:
            arrays["w1"] = zeros(m, p)
        if rank < max(k, n) / 2:
            arrays |= {"w2_a": uniform(n, rank), "w2_b": uniform(rank, k)}
        else:
            arrays["w2"] = uniform(n, k)
        given |= {"in_sizes": in_, "out_sizes": out}
        return cls(**making.statics(kernel, target), **arrays, **given)

    @property
    def sides(self) -> Sides:
        """((m, p), (n, k))."""
        first = [x for x in (self.w1, self.w1_a, self.w1_b) if x is not None]
        second = [x for x in (self.w2, self.w2_a, self.w2_b) if x is not None]
        if len(first) not in (1, 2) or len(second) not in (1, 2):
            raise ValueError(
                f"LoKr has {sorted(self.roles)}; give w1, or w1_a and w1_b, and the "
                "same for w2"
            )
        (m, p), (n, k) = (
            (parts[0].shape[-2], parts[-1].shape[-1]) for parts in (first, second)
        )
        return (m, p), (n, k)

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the two matrices make up a leaf of this shape."""
        layout.check(path, self, leaf)
        in_, out, _ = map(math.prod, self.axes.sizes(leaf.shape))
        (m, p), (n, k) = self.sides
        if (m * n, p * k) != (in_, out):
            raise ValueError(
                f"{path}: [{m}, {p}] and [{n}, {k}] make a kernel [{m * n}, {p * k}], "
                f"but the leaf is [{in_}, {out}]; was the adapter made for another "
                "model?"
            )

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns the branch, zero for layers without factors."""
        depth = layout.depth(kernel, self.axes)

        def whole(*parts: jax.Array | None) -> tuple[jax.Array, ...]:
            kept = (part for part in parts if part is not None)
            return tuple(layout.spread(part, self.layers, depth) for part in kept)

        first = whole(self.w1, self.w1_a, self.w1_b)
        second = whole(self.w2, self.w2_a, self.w2_b)
        last = first[-1].astype(layout.wide(first[-1]))
        first = (*first[:-1], self.scale * last)
        return layout.without_product(
            kernel, self.axes, branch=LinearMap((first, second), kronecker)
        )

    def as_lora(self) -> Lora | None:
        """Returns the Lora of both ranks' product, or None if the sizes are unknown.

            (a1 b1) (x) (a2 b2) = (a1 (x) a2) (b1 (x) b2)

        A full matrix is written as a product with an identity of its shorter side.
        """
        if self.in_sizes is None or self.out_sizes is None:
            return None
        a1, b1 = _thin(self.w1, self.w1_a, self.w1_b)
        a2, b2 = _thin(self.w2, self.w2_a, self.w2_b)
        batch, rank = a1.shape[:-2], a1.shape[-1] * a2.shape[-1]
        a = _outer(a1, a2).reshape(*batch, *self.in_sizes, rank)
        b = _outer(b1, b2).reshape(*batch, rank, *self.out_sizes)
        return Lora(a, b, self.scale, self.axes, self.dropout, self.layers)


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """All products of the entries of x and y, `[*batch, n, k, m, l]`."""
    return x[..., :, None, :, None] * y[..., None, :, None, :]


def _thin(
    full: jax.Array | None, a: jax.Array | None, b: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """A matrix as a product, at least float32."""
    if full is None:
        assert a is not None and b is not None
        return a.astype(layout.wide(a)), b.astype(layout.wide(b))
    full = full.astype(layout.wide(full))
    n, m = full.shape[-2:]
    eye = jnp.broadcast_to(
        jnp.eye(min(n, m), dtype=full.dtype), (*full.shape[:-2], *[min(n, m)] * 2)
    )
    return (eye, full) if n <= m else (full, eye)


def kronecker(
    both: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]], x: jax.Array
) -> jax.Array:
    """Returns `x (w1 (x) w2)`, through the bottleneck of a thin w2.

    Args:
      both: the one or two parts of w1, `[m, p]`, and those of w2, `[n, k]`.
      x: `[tokens, m n]`.
    """
    first, second = both
    m, n = first[0].shape[0], second[0].shape[0]
    y = x.reshape(-1, m, n) @ second[0]
    for part in first:
        y = jnp.einsum("tmr,mp->tpr", y, part)
    if len(second) == 2:
        y = y @ second[1]
    return y.reshape(x.shape[0], -1)


def split(size: int, factor: int) -> tuple[int, int]:
    """Returns two factors of a size, the first near `factor`, as LyCORIS chooses them.

    Example:
      >>> split(768, -1), split(768, 8), split(768, 9), split(768, 512)
      ((24, 32), (8, 96), (8, 96), (24, 32))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = max(1, min(math.isqrt(size), size if factor == -1 else factor))
    first = max(d for d in range(1, most + 1) if size % d == 0)
    return first, size // first
