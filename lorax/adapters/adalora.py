"""AdaLoRA's parametrisation: an update in the form of a singular value decomposition.

    W = W0 + scale * p diag(lam) q

`lam` starts at zero and is what rank allocation masks; `scale` always stays alpha over
the *initial* rank. Nothing here keeps p and q orthonormal: `lorax.optim.adalora` pulls
them towards that, and `orthogonal_penalty` measures how far off they are.

References:
  Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
  Fine-Tuning, arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from lorax import _checks, linalg
from lorax.adapters import layout, making, pairs
from lorax.adapters.lora import Lora
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Adapters, Axes, Factors, Field, KernelSpec, TargetSpec

STD = 0.02  # of p and q at init, as in github.com/QingruZhang/AdaLoRA


@register("adalora")
@flax.struct.dataclass
class AdaLora(Parametrisation):
    """Update `scale * p @ diag(lam) @ q` of one kernel, or of a stack of kernels.

    Attributes:
      p: `[*batch, *in, rank]`, the left singular vectors.
      lam: `[*batch, rank]`, the singular values, of either sign.
      q: `[*batch, rank, *out]`, the right singular vectors.
      scale: the factor on the product.
      axes: the leaf's in, out and batch axes.
      dropout: rate on the input of the adapter branch, in [0, 1).
      layers: the layers of the first batch axis that have factors; None for all.
      moved_by: the init that moved a part of the kernel into the factors, with what
        that part depends on, such as "pissa(rank=8)"; the adapter then fits only the
        rest of the kernel. None if it fits the kernel as given.
    """

    p: jax.Array
    lam: jax.Array
    q: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    moved_by: str | None = flax.struct.field(pytree_node=False, default=None)

    fields = {
        "p": Field("p", "batch in rank", decays=True),
        "lam": Field("lam", "batch rank", decays=True),
        "q": Field("q", "batch rank out", decays=True),
    }
    additive = True
    padded = True
    counts_ranks = True
    absorbs = "lam"

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> AdaLora:
        """Returns p, q ~ N(0, 0.02^2) and lam = 0."""
        del shared
        in_, out, batch = making.sizes(kernel, target)
        rank, dtype = target.rank, target.dtype
        left, right = jax.random.split(key)
        p = STD * jax.random.normal(left, (*batch, *in_, rank), dtype)
        q = STD * jax.random.normal(right, (*batch, rank, *out), dtype)
        lam = jnp.zeros((*batch, rank), dtype)
        return cls(p, lam, q, **making.statics(kernel, target))

    @classmethod
    def from_triplets(
        cls,
        kernel: KernelSpec,
        target: TargetSpec,
        u: jax.Array,
        s: jax.Array,
        vt: jax.Array,
    ) -> AdaLora:
        """Returns the adapter made from singular triplets of the flattened kernel."""
        p, q = making.unflatten(kernel, target, u, vt)
        p, lam, q = (x.astype(target.dtype) for x in (p, s, q))
        return cls(p, lam, q, **making.statics(kernel, target))

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns (p, scale * lam * q) over the whole stack."""
        dtype = layout.wide(self.lam, self.q)
        lam = self.lam.astype(dtype).reshape(self.lam.shape + (1,) * len(self.axes.out))
        depth = layout.depth(kernel, self.axes)
        both = self.p, self.scale * lam * self.q.astype(dtype)
        a, b = (layout.spread(f, self.layers, depth) for f in both)
        return Factors(a, b)

    def as_lora(self) -> Lora:
        """Returns the Lora `p @ (lam * q)`."""
        dtype = layout.wide(self.lam, self.q)
        lam = self.lam.astype(dtype).reshape(self.lam.shape + (1,) * len(self.axes.out))
        static = self.scale, self.axes, self.dropout, self.layers, self.moved_by
        return Lora(self.p, lam * self.q.astype(dtype), *static)


def orthogonal_penalty(
    adapters: Adapters, form: Literal["squared", "norm"] = "squared"
) -> jax.Array:
    """Returns how far the singular vectors of every AdaLora are from orthonormal.

        squared:  mean over matrices of |p^T p - I|^2 + |q q^T - I|^2
        norm:     mean over all p and q of |p^T p - I|                 (as released)

    The paper's penalty is M times "squared" for M matrices, with weight 0.1; relative
    to the loss, a sum grows with the number of matrices, a mean does not. The released
    code uses 0.1 times "norm", PEFT 0.5 times. At exact orthonormality, the norm's
    gradient here is zero, not NaN.

    This is mainly a metric. `lorax.optim.adalora` needs no penalty in the loss: by
    default it pulls p and q towards orthonormality with a separate step, and its other
    `orthogonal_form`s add this function's gradient before the optimiser. As a loss term
    under Adam it does harm: while lam = 0 at the start, p and q get no gradient but the
    penalty's.

    Args:
      adapters: `{path: Adapter}`; those other than AdaLora are ignored. Every layer of
        a stack counts as a matrix.
      form: "squared" or "norm".

    Returns:
      A scalar, float32; 0 without an AdaLora.

    Raises:
      ValueError: an unknown form.

    Example:
      >>> axes = Axes((0,), (1,))
      >>> a = AdaLora(jnp.eye(3, 2), jnp.zeros(2), 2 * jnp.eye(2), 1.0, axes)
      >>> float(orthogonal_penalty({"w": a}))  # |4 I - I|^2 = 2 * 9
      18.0
    """
    _checks.one_of("form", form, ("squared", "norm"))
    found = [a for a in adapters.values() if isinstance(a, AdaLora)]
    parts = [part.reshape(-1) for a in found for part in _squared_distances(a)]
    squared = jnp.concatenate([jnp.zeros(0), *parts])  # [matrices]
    if not found:
        return squared.sum()
    if form == "squared":
        return 2 * squared.mean()  # p and q of one matrix together
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0).mean()


def _squared_distances(adapter: AdaLora) -> tuple[jax.Array, jax.Array]:
    """`|p^T p - I|^2` and `|q q^T - I|^2` of every matrix in the stack."""
    p, q = (factor.astype(jnp.float32) for factor in pairs.stacked(adapter))

    def away(gram: jax.Array) -> jax.Array:
        return jnp.sum((gram - jnp.eye(adapter.rank)) ** 2, axis=(1, 2))

    return away(linalg.dot(p.mT, p)), away(linalg.dot(q, q.mT))
