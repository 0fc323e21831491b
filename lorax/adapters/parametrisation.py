"""What a parametrisation declares, and what follows from the declaration.

A class names its arrays once, in `fields`, and says how it meets a linear operation, in
`factors`. How its arrays are shaped, sharded, padded, decayed and saved, what its
update is and what merging gives, all follow:

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
    """Entries by field: of a class all, of an adapter those whose array it has."""

    def __init__(self, entries: Mapping[str, Any], optional: frozenset[str]) -> None:
        self.entries, self.optional = dict(entries), optional

    def __get__(self, adapter: Any, owner: type) -> dict[str, Any]:
        if adapter is None:
            return self.entries
        absent = {n for n in self.optional if getattr(adapter, n) is None}
        return {n: entry for n, entry in self.entries.items() if n not in absent}


class Parametrisation:
    """The base of every adapter class, a frozen `flax.struct.dataclass`.

    Static fields that classes may have, and every layer above knows: `axes: Axes`, the
    leaf's; `scale: float`; `dropout: float`, on the branch's input; `layers`, of the
    first batch axis those that have factors; `moved_by`, the init that moved a part of
    the kernel into the arrays; `lent`, of frozen fields the names of their arrays in
    `Base.frozen`, pairs `(field, name)`.

    Attributes:
      fields: the arrays, by name, in the order of the class.
      roles: of the trained ones, name -> role.
      options: hyperparameters that `Target.options` may give, with their defaults.
      replaces: True: the array takes the place of the leaf and adds no update.
      additive: True: the update adds to the kernel and is proportional to `scale`, so
        that updates of several adapters can be summed and scaled.
      padded: True: zeros in the ranks of every field change no update.
      counts_ranks: True: training sees how many ranks there are (allocation, penalty),
        so that members of a population cannot be padded to one.
      absorbs: the field that a ratio of two scales folds into; None: none does.
      drops: True: dropout acts on the branch's input.
      reads_kernel: True: `factors` reads the kernel's values (a norm of its columns),
        not only its shape; a quantised one is then decoded for it.
      by_rows: True: acts on the rows of an embedding that `Target.rows` numbers.
      sliced: registered name of the class that `Target.slices` asks for; None: none.
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
        """Reads the roles of trained fields off the declaration."""
        super().__init_subclass__(**kwargs)
        pairs = {name: field.pair for name, field in cls.fields.items() if field.pair}
        if pairs and pairs != {"a": "b", "b": "a"}:
            raise TypeError(
                f"{cls.__name__} declares the pairs {pairs}; the two factors whose "
                "product is the update are called a, which reads, and b, which writes"
            )
        cls.roles = {n: f.role for n, f in cls.fields.items() if not f.frozen}
        optional = frozenset(n for n, f in cls.fields.items() if f.optional)
        if optional:
            for name in ("fields", "roles"):
                setattr(cls, name, _Present(getattr(cls, name), optional))

    @property
    def rank(self) -> int:
        """The width of the bottleneck, of the first field that has one."""
        for name, field in self.fields.items():
            array = getattr(self, name)
            if "rank" in field.words and array is not None:
                return array.shape[layout.axis_of(self, name, "rank")]
        raise AttributeError(f"{type(self).__name__} has no rank")

    @classmethod
    def check_target(cls, target: TargetSpec) -> None:
        """Raises ValueError for a target that the class cannot serve."""
        del target

    @classmethod
    def largest_rank(cls, in_: int, out: int) -> int | None:
        """Returns the largest rank for a kernel `[in, out]`; None: no limit."""
        has_rank = any("rank" in field.words for field in cls.fields.values())
        return min(in_, out) if has_rank else None

    @classmethod
    def shared(
        cls, key: jax.Array, chosen: Mapping[str, tuple[TargetSpec, KernelSpec]]
    ) -> dict[str, jax.Array]:
        """Returns the frozen arrays that several adapters share, by name.

        Args:
          key: that of `lorax.init`.
          chosen: `{path: (target, kernel)}`, all leaves that get this class.
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
          key: of this path.
          kernel: the leaf and its axes.
          target: rank, scale, dropout, dtype, layers, options.
          shared: what `shared` returned; a frozen array, shared or of this leaf alone,
            is put in its field, and its name in `lent`.
        """
        raise TypeError(
            f"{cls.__name__} has no make(key, kernel, target, shared): write it, or "
            "give the target an init of your own"
        )

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the arrays fit a leaf of this shape and dtype."""
        layout.check(path, self, leaf)

    def factors(self, kernel: jax.Array) -> Factors | None:
        """Returns the form for the fast path, over the whole stack; None: merge.

        Args:
          kernel: the leaf; its shape and dtype alone, unless `reads_kernel`.
        """
        del kernel
        return None

    def delta(self, kernel: jax.Array) -> jax.Array:
        """Returns the change of the kernel in its own layout, at least float32."""
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
                f"{type(self).__name__} has no factors(kernel), so it needs a "
                "delta(kernel) and a merge(kernel) of its own"
            )
        return factors

    def as_lora(self) -> Any:
        """Returns the same update as a plain Lora; None where it is not one."""
        return None

    axes: Axes
    lent: tuple[tuple[str, str], ...] = ()


def as_lora(adapter: Any) -> Any:
    """Returns a product in another form (AdaLora, slices) as a Lora; others pass."""
    plain = adapter.as_lora()
    return adapter if plain is None else plain


REGISTRY: dict[str, type[Parametrisation]] = {}
"""Class by registered name."""


def register(name: str, cls: Any = None) -> Any:
    """Registers a parametrisation under a name, for targets, configs and files.

    Args:
      name: such as "lora": what `Target(adapter=)` and `adapters.json` say.
      cls: the class; None: returns a decorator.

    Returns:
      The class, or the decorator.

    Raises:
      ValueError: a name that another class has.
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
    """Returns a class by its registered name; a class passes.

    Raises:
      ValueError: a name that is not registered, or something else.
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
    """Returns the name under which a class is registered; None where it is not."""
    return next((name for name, held in REGISTRY.items() if held is cls), None)


def of_target(target: TargetSpec) -> type[Parametrisation]:
    """Returns the class that a target asks for, that of its slices where it has some.

    Raises:
      ValueError: slices of a class that has no sliced form.
    """
    cls = get(target.adapter)
    if target.slices is None:
        return cls
    if cls.sliced is None:
        raise ValueError(
            f"slices={target.slices} go with adapter='lora', not {target.adapter!r}"
        )
    return get(cls.sliced)


def bound(adapter: Any, frozen: Mapping[str, jax.Array], path: str) -> Any:
    """Returns the adapter with its frozen arrays in their fields.

    Raises:
      ValueError: an array that `frozen` lacks.
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
    """Takes the frozen arrays out of a new adapter; returns both."""
    lent = getattr(adapter, "lent", ())
    arrays = {name: getattr(adapter, field) for field, name in lent}
    return adapter.replace(**{field: None for field, _ in lent}), arrays
