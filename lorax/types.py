"""Aliases and the adapter protocol that the layers above agree on."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

import jax

PyTree = Any
"""A Flax parameter tree: nested dicts, a FrozenDict, an `nnx.State`, any pytree."""


class Axes(NamedTuple):
    """Which axes of a leaf are read, written, and repeated.

    Attributes:
      in_: axes contracted with the activation.
      out: axes of the result.
      batch: axes along which independent kernels are stacked (layers, experts).
    """

    in_: tuple[int, ...]
    out: tuple[int, ...]
    batch: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The leaf's axes as adapters lay them out: batch, in, out."""
        return self.batch + self.in_ + self.out

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Returns the (in, out, batch) sizes of a leaf of this `shape`."""
        return tuple(tuple(shape[axis] for axis in group) for group in self)


class Factors(NamedTuple):
    """The form `(W0 + a @ b) * gain` in which an adapter meets a linear operation.

    Attributes:
      a: `[*batch, *in, rank]`.
      b: `[*batch, rank, *out]`, the scale folded in.
      gain: `[*batch, *out]`, on the outputs; None for ones.
    """

    a: jax.Array
    b: jax.Array
    gain: jax.Array | None = None


class GradSketch(NamedTuple):
    """The leading singular triplets of a kernel's mean gradient.

    Attributes:
      u: `[*batch, *in, k]`, orthonormal over the inputs.
      s: `[*batch, k]`, in falling order.
      vt: `[*batch, k, *out]`, orthonormal over the outputs.
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array


class ActivationStats(NamedTuple):
    """The leading principal components of what a kernel reads.

    Attributes:
      u: `[*batch, *in, k]`, orthonormal over the inputs.
      s: `[*batch, k]`, standard deviations along them, in falling order.
      variance: `[*batch]`, of all inputs together; s^2 / variance is what a component
        explains.
      tokens: `[*batch]`, how many rows were counted.
    """

    u: jax.Array
    s: jax.Array
    variance: jax.Array
    tokens: jax.Array


class Covariance(NamedTuple):
    """The second moments of what a kernel reads, not centred: X^T X / tokens.

    Attributes:
      matrix: `[*batch, in, in]`, in axes flattened.
      tokens: `[*batch]`, how many rows were counted.
    """

    matrix: jax.Array
    tokens: jax.Array


class PairStatics(NamedTuple):
    """Scale and true rank of one adapter where a population gives each member its own.

    A train step passes `pairs={path: PairStatics}` to `tx.update`; without it a pair
    transform reads the adapter's own `scale` and `rank`.
    """

    scale: Any
    rank: Any


class MicrobatchNorms(NamedTuple):
    """Squared gradient norms of a step's microbatches, for noise-scale estimates.

    A train step that accumulates passes them to `tx.update` as `microbatch=`; they are
    taken before clipping.

    Attributes:
      small: [], mean over the microbatches with target tokens of `|g_i|^2`.
      large: [], `|g|^2` of the gradient that they add up to.
      small_batch: examples in a microbatch.
      large_batch: examples in the whole batch.
    """

    small: jax.Array
    large: jax.Array
    small_batch: int
    large_batch: int


class Adapter(Protocol):
    """What every parametrisation offers; its array fields are all trainable.

    Attributes:
      roles: field name -> role, by which optimisers label leaves.
    """

    roles: ClassVar[dict[str, str]]

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError, naming `path`, unless the adapter fits the leaf."""

    def delta(self, kernel: jax.Array) -> jax.Array:
        """Returns the change of the kernel, in the leaf's layout, at least float32."""

    def merge(self, kernel: jax.Array) -> jax.Array:
        """Returns the adapted kernel: float32 accumulation, one rounding."""

    def factors(self, kernel: jax.Array) -> Factors | None:
        """Returns the low-rank form for the fast path; None: replace the leaf."""


Adapters = dict[str, Adapter]
