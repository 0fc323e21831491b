"""The types and protocols that the layers above share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
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
        """Returns the (in, out, batch) sizes of a leaf with this `shape`."""
        return tuple(tuple(shape[axis] for axis in group) for group in self)


class Field(NamedTuple):
    """What everything above a parametrisation knows about one of its arrays.

    Attributes:
      role: what the array does, used by optimisers as its label: "a" reads, "b" writes,
        "magnitude" rescales; any other word for anything else.
      dims: its axes in order, as words: "batch" (the kernel's stack), "in", "out",
        "rank"; "leaf" for all axes of the leaf; any other word for a single axis of the
        method's own. "in rank" of a kernel `[layers, heads, size, out]` read over heads
        and sizes has three axes; without "batch" the stack shares the array.
      decays: True if weight decay pulls towards the pretrained kernel: at zero, the
        update is zero.
      pair: name of the other factor, where `scale * a @ b` of the two is the update
        (times a gain, if there is one). They are called a and b.
      frozen: True for an array that does not train. It is kept in `Base.frozen`, under
        a name that the adapter stores, and in the adapter itself the field is None.
      optional: True for an array that only some adapters of the class have. In the
        others it is None, and their `fields` and `roles` leave it out.
    """

    role: str
    dims: str
    decays: bool = False
    pair: str | None = None
    frozen: bool = False
    optional: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The dims, one by one."""
        return tuple(self.dims.split())


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["apply"]
)
@dataclasses.dataclass(frozen=True)
class LinearMap:
    """A linear map of activations, with its own arrays for every kernel of a stack.

    Attributes:
      arrays: a pytree of `[*batch, ...]`.
      apply: `(arrays of one kernel, x: [n, in]) -> [n, in]` or `[n, out]`, linear in x,
        in and out axes flattened. Use a module-level function, not a new one at every
        call, because it is part of the compilation cache key.
    """

    arrays: Any
    apply: Callable[[Any, jax.Array], jax.Array]


class Factors(NamedTuple):
    """The form in which an adapter enters a linear operation.

        y = ((x + x D) W0 + (x @ a) @ b + C(x)) * gain

    A thin product works for every view of a kernel that keeps in and out axes apart.
    The maps D and C act on whole inputs: a view that slices, flips or splits the axes
    they act on is merged, as `on_merge` says.

    Attributes:
      a: `[*batch, *in, rank]`; rank 0 if there is no thin product.
      b: `[*batch, rank, *out]`, with the scale folded in.
      gain: `[*batch, *out]`, on the outputs; None for ones.
      inputs: D, the change to the frozen kernel's inputs, or None.
      branch: C, a branch that is not a thin product, or None.
    """

    a: jax.Array
    b: jax.Array
    gain: jax.Array | None = None
    inputs: LinearMap | None = None
    branch: LinearMap | None = None

    @property
    def adds(self) -> bool:
        """True if the form only adds to a kernel, whatever the kernel is."""
        return self.gain is None and self.inputs is None

    @property
    def maps(self) -> bool:
        """True if a map acts on whole inputs."""
        return self.inputs is not None or self.branch is not None

    @property
    def rigid(self) -> tuple[str, ...]:
        """The kinds of axes on which a map acts, and which no view may cut."""
        if self.branch is not None:
            return "in", "out"
        return () if self.inputs is None else ("in",)


class Base(NamedTuple):
    """Parameters together with the adapters' frozen arrays, passed as `params`.

    `lorax.init` returns one if a method has frozen arrays (VeRA's projections), else
    the plain parameters. `adapt` and `merge` unpack it: the adapted function never sees
    it.

    Attributes:
      params: the parameter tree.
      frozen: `{name: array}`, by the names that adapters refer to.
    """

    params: PyTree
    frozen: Mapping[str, jax.Array]


class GradSketch(NamedTuple):
    """The leading singular triplets of a kernel's mean gradient.

    Attributes:
      u: `[*batch, *in, k]`, orthonormal over the inputs.
      s: `[*batch, k]`, descending.
      vt: `[*batch, k, *out]`, orthonormal over the outputs.
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array


class ActivationStats(NamedTuple):
    """The leading principal components of what a kernel reads.

    Attributes:
      u: `[*batch, *in, k]`, orthonormal over the inputs.
      s: `[*batch, k]`, standard deviations along them, descending.
      variance: `[*batch]`, total over all inputs; s^2 / variance is the fraction that a
        component explains.
      tokens: `[*batch]`, how many rows were counted.
    """

    u: jax.Array
    s: jax.Array
    variance: jax.Array
    tokens: jax.Array


class Covariance(NamedTuple):
    """The uncentred second moments of what a kernel reads: X^T X / tokens.

    Attributes:
      matrix: `[*batch, in, in]`, with the in axes flattened.
      tokens: `[*batch]`, how many rows were counted.
    """

    matrix: jax.Array
    tokens: jax.Array


class PairStatics(NamedTuple):
    """The scale and true rank of one adapter, where population members differ in them.

    A train step passes `pairs={path: PairStatics}` to `tx.update`; without it, a pair
    transform reads the adapter's own `scale` and `rank`.
    """

    scale: Any
    rank: Any


class MicrobatchNorms(NamedTuple):
    """Squared gradient norms of a step's microbatches, for noise-scale estimates.

    A train step that accumulates passes them to `tx.update` as `microbatch=`, computed
    before clipping.

    Attributes:
      small: [], mean of `|g_i|^2` over the microbatches with target tokens.
      large: [], `|g|^2` of their weighted mean.
      small_batch: examples in a microbatch.
      large_batch: examples in the whole batch.
    """

    small: jax.Array
    large: jax.Array
    small_batch: int
    large_batch: int


class KernelSpec(Protocol):
    """What building an adapter needs to know about a leaf; see `lorax.Kernel`."""

    @property
    def path(self) -> str:
        """The leaf's path."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""

    @property
    def op(self) -> str:
        """How the program uses it."""

    @property
    def value(self) -> Any:
        """The leaf itself."""

    def linear_axes(self) -> Axes:
        """Returns the leaf's axes; ValueError if no linear operation uses it."""


class TargetSpec(Protocol):
    """What building an adapter needs to know about a rule; see `lorax.Target`."""

    @property
    def pattern(self) -> str:
        """The pattern that paths must match."""

    @property
    def adapter(self) -> Any:
        """A registered name, or the class."""

    @property
    def rank(self) -> int:
        """The rank of the update."""

    @property
    def scale(self) -> float:
        """The factor on the update."""

    @property
    def dropout(self) -> float:
        """The dropout rate on the branch's input."""

    @property
    def dtype(self) -> Any:
        """The dtype of the arrays."""

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers of a stack that get factors."""

    @property
    def slices(self) -> tuple[int, ...] | None:
        """The parts of a fused kernel that get factors."""

    @property
    def rows(self) -> Sequence[int] | None:
        """The rows of an embedding that train."""

    @property
    def options(self) -> Any:
        """Hyperparameters, by name."""


class Adapter(Protocol):
    """What every parametrisation offers; `adapters.Parametrisation` has defaults.

    Attributes:
      fields: its arrays, by name.
      roles: `{name: role}` of the arrays that train.
      replaces: True if the array is the leaf itself.
      additive: True if the update is added and is proportional to `scale`.
      padded: True if padding the ranks with zeros changes no update.
      reads_kernel: True if `factors` reads the kernel's values.
      by_rows: True if it acts on some rows of an embedding.
    """

    fields: ClassVar[dict[str, Field]]
    roles: ClassVar[dict[str, str]]
    replaces: ClassVar[bool]
    additive: ClassVar[bool]
    padded: ClassVar[bool]
    reads_kernel: ClassVar[bool]
    by_rows: ClassVar[bool]

    def as_lora(self) -> Any:
        """Returns the same update as a plain Lora, or None if it is not one."""

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError, naming `path`, unless the adapter fits the leaf."""

    def delta(self, kernel: jax.Array) -> jax.Array:
        """Returns the change to the kernel, in the leaf's layout, at least float32."""

    def merge(self, kernel: jax.Array) -> jax.Array:
        """Returns the adapted kernel: float32 accumulation, one rounding."""

    def factors(self, kernel: jax.Array) -> Factors | None:
        """Returns the form for the fast path, or None if the kernel must be merged."""


Adapters = dict[str, Adapter]
