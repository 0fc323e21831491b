"""AdaLoRA's parametrisation: an update in the form of a singular value decomposition.

    W = W0 + scale * p diag(lam) q

`lam` starts at zero and is what rank allocation masks; `scale` is alpha over the
*initial* rank for ever. Nothing here keeps p and q orthonormal: `lorax.optim.adalora`
pulls them there, and `orthogonal_penalty` measures how far they are.

References:
  Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
  Fine-Tuning, arXiv:2303.10512.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp

from lorax.adapters import layout
from lorax.types import Adapters, Axes, Factors


@flax.struct.dataclass
class AdaLora:
    """Update `scale * p @ diag(lam) @ q` of one kernel, or of a stack of kernels.

    Attributes:
      p: `[*batch, *in, rank]`, the left singular vectors.
      lam: `[*batch, rank]`, the singular values, of either sign.
      q: `[*batch, rank, *out]`, the right singular vectors.
      scale: the factor on the product.
      axes: the leaf's in, out and batch axes.
      dropout: rate on the input of the adapter branch, in [0, 1).
      layers: the layers of the first batch axis that have factors; None for all.
      moved_by: the init that moved a part of the kernel into the factors, with what the
        part depends on, such as "pissa(rank=8)": the adapter fits what was left of the
        kernel alone. None: it fits the kernel as it was given.
    """

    p: jax.Array
    lam: jax.Array
    q: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    moved_by: str | None = flax.struct.field(pytree_node=False, default=None)

    roles: ClassVar[dict[str, str]] = {"p": "p", "lam": "lam", "q": "q"}

    @property
    def rank(self) -> int:
        """The number of triplets, masked ones included."""
        return self.p.shape[-1]

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the factors fit a leaf of this shape and dtype."""
        shapes = [(self.p.shape, "ir"), (self.lam.shape, "r"), (self.q.shape, "ro")]
        layout.check(path, leaf, self.axes, self.layers, self.rank, shapes)

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns (p, scale * lam * q) over the whole stack."""
        dtype = layout.wide(self.lam, self.q)
        lam = self.lam.astype(dtype).reshape(self.lam.shape + (1,) * len(self.axes.out))
        depth = layout.depth(kernel, self.axes)
        both = self.p, self.scale * lam * self.q.astype(dtype)
        return Factors(*(layout.spread(f, self.layers, depth) for f in both))

    def delta(self, kernel: jax.Array) -> jax.Array:
        """Returns the update in the leaf's layout and at least float32."""
        a, b, _ = self.factors(kernel)
        return layout.product(a, b, self.axes, kernel)

    def merge(self, kernel: jax.Array) -> jax.Array:
        """Returns the adapted kernel, rounded once to its dtype."""
        return layout.added(kernel, self.delta(kernel))


def orthogonal_penalty(
    adapters: Adapters, form: Literal["squared", "norm"] = "squared"
) -> jax.Array:
    """Returns how far the singular vectors of every AdaLora are from orthonormal.

        squared:  mean over matrices of |p^T p - I|^2 + |q q^T - I|^2
        norm:     mean over all p and q of |p^T p - I|                 (as released)

    The paper's is M times "squared" for M matrices, with the weight 0.1; a sum grows
    with the number of matrices beside the loss, a mean does not. The released code has
    0.1 times "norm", PEFT 0.5 times. The norm's gradient at exact orthonormality is
    zero here, not NaN.

    A measure first. `lorax.optim.adalora` needs no penalty in the loss: by default it
    pulls p and q to orthonormality by a step of its own, and its `orthogonal_form` puts
    this function's gradient before the optimiser. As a term of the loss under Adam it
    costs: lam = 0 at the start leaves p and q no gradient but the penalty's.

    Args:
      adapters: `{path: Adapter}`; others than AdaLora count for nothing. Every layer
        of a stack is a matrix of its own.
      form: which of the two.

    Returns:
      A scalar, float32; 0 without an AdaLora.

    Raises:
      ValueError: another form.

    Example:
      >>> axes = Axes((0,), (1,))
      >>> a = AdaLora(jnp.eye(3, 2), jnp.zeros(2), 2 * jnp.eye(2), 1.0, axes)
      >>> float(orthogonal_penalty({"w": a}))  # |4 I - I|^2 = 2 * 9
      18.0
    """
    if form not in ("squared", "norm"):
        raise ValueError(f"form={form!r}; choose 'squared' or 'norm'")
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
    batch = adapter.lam.shape[:-1]
    n, rank = math.prod(batch), adapter.rank
    p = adapter.p.astype(jnp.float32).reshape(n, -1, rank)
    q = adapter.q.astype(jnp.float32).reshape(n, rank, -1)
    gram = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
    away = lambda g: jnp.sum((g - jnp.eye(rank)) ** 2, axis=(1, 2))
    return away(gram(p.mT, p)), away(gram(q, q.mT))
