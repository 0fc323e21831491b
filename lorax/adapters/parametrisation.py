"""The base class of parametrisations, which derives most behaviour from declarations.

A class declares its arrays once, in `fields`, and how it enters a linear operation, in
`factors`. How its arrays are shaped, sharded, padded, decayed and saved, what its
update is and what merging gives all follow from that:

    @adapters.register("scaled")
    @flax.struct.dataclass
    class Scaled(adapters.Parametrisation):
        gain: jax.Array
        axes: Axes = flax.struct.field(pytree_node=False)

        fields = {"gain": Field("magnitude", "batch out")}

        @classmethod
        def make(cls, key, kernel, target, shared):
            axes = kernel.linear_axes()
            in_, out, batch = making.sizes(kernel, target)
            return cls(jnp.ones((*batch, *out), target.dtype), axes)

        def factors(self, kernel):
            return layout.without_product(kernel, self.axes, gain=self.gain)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorax import registry, tree
from lorax.adapters import layout
from lorax.types import Axes, Factors, Field, KernelSpec, TargetSpec


class _Present:
    """Entries by field: all on a class, those with an array on an adapter."""

    def __init__(self, entries: Mapping[str, Any], optional: frozenset[str]) -> None:
        self.entries, self.optional = dict(entries), optional

    def __get__(self, adapter: Any, owner: type) -> dict[str, Any]:
        if adapter is None:
            return self.entries
        absent = {n for n in self.optional if getattr(adapter, n) is None}
        return {n: entry for n, entry in self.entries.items() if n not in absent}


class Parametrisation:
    """The base of every adapter class, a frozen `flax.struct.dataclass`.

    Classes may have these static fields, which every layer above knows: `axes: Axes`,
    the leaf's axes; `scale: float`; `dropout: float`, on the branch's input; `layers`,
    the layers of the first batch axis that have factors; `moved_by`, the init that
    moved a part of the kernel into the arrays; `lent`, pairs `(field, name)` of frozen
    fields and the names of their arrays in `Base.frozen`.

    Attributes:
      fields: the arrays, by name, in the order of the class.
      roles: `{name: role}` of the arrays that train.
      options: hyperparameters that `Target.options` may give, with their defaults.
      replaces: True if the array replaces the leaf instead of adding an update.
      additive: True if the update is added to the kernel and is proportional to
        `scale`, so that updates of several adapters can be summed and scaled.
      padded: True if padding the ranks of every field with zeros changes no update.
      counts_ranks: True if training depends on the number of ranks (allocation,
        penalty), so that members of a population cannot be padded to the same rank.
      absorbs: the field into which a ratio of two scales is folded, or None.
      drops: True if dropout acts on the branch's input.
      reads_kernel: True if `factors` reads the kernel's values (a norm of its columns),
        not only its shape; a quantised kernel is then decoded for it.
      by_rows: True if it acts on the rows of an embedding given by `Target.rows`.
      sliced: registered name of the class to use for `Target.slices`, or None.
    """

    fields: ClassVar[dict[str, Field]] = {}
    roles: ClassVar[dict[str, str]] = {}
    options: ClassVar[Mapping[str, Any]] = {}
    replaces: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    padded: ClassVar[bool] = False
    counts_ranks: ClassVar[bool] = False
    absorbs: ClassVar[str | None] = None
    drops: ClassVar[bool] = True
    reads_kernel: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    sliced: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Derives the roles of trained fields from the declaration."""
        super().__init_subclass__(**kwargs)
        pairs = {name: field.pair for name, field in cls.fields.items() if field.pair}
        if pairs and pairs != {"a": "b", "b": "a"}:
            raise TypeError(
                f"{cls.__name__} declares the pairs {pairs}; name the two factors "
                "whose product is the update a, which reads, and b, which writes"
            )
        cls.roles = {n: f.role for n, f in cls.fields.items() if not f.frozen}
        optional = frozenset(n for n, f in cls.fields.items() if f.optional)
        if optional:
            for name in ("fields", "roles"):
                setattr(cls, name, _Present(getattr(cls, name), optional))

    @property
    def rank(self) -> int:
        """The width of the bottleneck, from the first field that has one."""
        for name, field in self.fields.items():
            array = getattr(self, name)
            if "rank" in field.words and array is not None:
                return array.shape[layout.axis_of(self, name, "rank")]
        raise AttributeError(f"{type(self).__name__} has no rank")

    @classmethod
    def check_target(cls, target: TargetSpec) -> None:
        """Raises ValueError for a target that the class does not support."""
        del target

    @classmethod
    def largest_rank(cls, in_: int, out: int) -> int | None:
        """Returns the largest rank for a kernel `[in, out]`, or None for no limit."""
        has_rank = any("rank" in field.words for field in cls.fields.values())
        return min(in_, out) if has_rank else None

    @classmethod
    def shared(
        cls, key: jax.Array, chosen: Mapping[str, tuple[TargetSpec, KernelSpec]]
    ) -> dict[str, jax.Array]:
        """Returns the frozen arrays that several adapters share, by name.

        Args:
          key: the key given to `lorax.init`.
          chosen: `{path: (target, kernel)}` of all leaves that get this class.
        """
        del key, chosen
        return {}

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> Any:
        """Returns an adapter whose update is zero: the "standard" init.

        Args:
          key: the key for this path.
          kernel: the leaf and its axes.
          target: rank, scale, dropout, dtype, layers, options.
          shared: what `shared` returned. Put a frozen array, shared or of this leaf
            alone, in its field, and its name in `lent`.
        """
        raise TypeError(
            f"{cls.__name__} has no make(key, kernel, target, shared): write one, or "
            "give the target an init of your own"
        )

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the arrays fit a leaf of this shape and dtype."""
        layout.check(path, self, leaf)

    def factors(self, kernel: jax.Array) -> Factors | None:
        """Returns the form for the fast path, over the whole stack; None to merge.

        Args:
          kernel: the leaf; read only its shape and dtype, unless `reads_kernel` is set.
        """
        del kernel
        return None

    def delta(self, kernel: jax.Array) -> jax.Array:
        """Returns the change to the kernel, in its layout and at least float32."""
        factors = self._form(kernel)
        if factors.gain is not None:
            return layout.merged(factors, self.axes, kernel) - kernel
        added = layout.added_by(factors, self.axes, kernel)
        return jnp.zeros(kernel.shape, layout.wide(kernel)) if added is None else added

    def merge(self, kernel: jax.Array) -> jax.Array:
        """Returns the adapted kernel, rounded once to its dtype."""
        whole = layout.merged(self._form(kernel), self.axes, kernel)
        return whole.astype(kernel.dtype)

    def _form(self, kernel: jax.Array) -> Factors:
        factors = self.factors(kernel)
        if factors is None:
            raise TypeError(
                f"{type(self).__name__} has no factors(kernel), so it must define "
                "delta(kernel) and merge(kernel)"
            )
        return factors

    def as_lora(self) -> Any:
        """Returns the same update as a plain Lora, or None if it is not one."""
        return None

    axes: Axes
    lent: tuple[tuple[str, str], ...] = ()


def as_lora(adapter: Any) -> Any:
    """Returns the adapter as a Lora where it has that form, else unchanged."""
    plain = adapter.as_lora()
    return adapter if plain is None else plain


REGISTRY: dict[str, type[Parametrisation]] = {}
"""Class by registered name."""


def register(name: str, cls: Any = None) -> Any:
    """Registers a parametrisation under a name, for targets, configs and files.

    Args:
      name: the name used in `Target(adapter=)` and `adapters.json`, such as "lora".
      cls: the class; None returns a decorator.

    Returns:
      The class, or the decorator.

    Raises:
      ValueError: the name belongs to another class.
      TypeError: not a subclass of `Parametrisation` with fields.

    Example:
      >>> from lorax import adapters
      >>> adapters.get("lora") is adapters.Lora
      True
    """
    if cls is None:
        return lambda cls: register(name, cls)
    if not (isinstance(cls, type) and issubclass(cls, Parametrisation) and cls.fields):
        raise TypeError(
            f"{cls!r}: a registered adapter is a subclass of "
            "lorax.adapters.Parametrisation that declares its fields"
        )
    registry.require_free("adapter", name, REGISTRY.get(name), cls)
    REGISTRY[name] = cls
    return cls


def get(adapter: str | type) -> type[Parametrisation]:
    """Returns the class registered under a name; a class is returned as it is.

    Raises:
      ValueError: a name that is not registered, or anything else.
    """
    if isinstance(adapter, type) and issubclass(adapter, Parametrisation):
        return adapter
    if isinstance(adapter, str) and adapter in REGISTRY:
        return REGISTRY[adapter]
    raise ValueError(
        f"adapter={adapter!r}; choose one of {', '.join(sorted(REGISTRY))}, import the "
        "module that registers it, or pass the class itself, a subclass of "
        "lorax.adapters.Parametrisation"
    )


def name_of(cls: type) -> str | None:
    """Returns the name under which a class is registered, or None."""
    return next((name for name, held in REGISTRY.items() if held is cls), None)


def of_target(target: TargetSpec) -> type[Parametrisation]:
    """Returns the class that a target asks for, in its sliced form if it has slices.

    Raises:
      ValueError: slices for a class that has no sliced form.
    """
    cls = get(target.adapter)
    if target.slices is None:
        return cls
    if cls.sliced is None:
        raise ValueError(
            f"slices={target.slices} needs adapter='lora', not {target.adapter!r}"
        )
    return get(cls.sliced)


def bound(adapter: Any, frozen: Mapping[str, jax.Array], path: str) -> Any:
    """Returns the adapter with its frozen arrays filled in.

    Raises:
      ValueError: `frozen` lacks one of the arrays.
    """
    lent = getattr(adapter, "lent", ())
    if not lent:
        return adapter
    for field, name in lent:
        if name not in frozen:
            raise ValueError(
                f"{path}: {type(adapter).__name__} needs the frozen array {name!r} for "
                f"its {field}; pass what lorax.init returned as the second argument, "
                "or lorax.Base(params, frozen); "
                + (tree.nearest(name, frozen) if frozen else "there are none here")
            )
    return adapter.replace(**{field: frozen[name] for field, name in lent})


def lent_out(adapter: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Moves the frozen arrays out of a new adapter; returns both."""
    lent = getattr(adapter, "lent", ())
    arrays = {name: getattr(adapter, field) for field, name in lent}
    return adapter.replace(**{field: None for field, _ in lent}), arrays
