"""The visitor of `adapt`: it emits low-rank branches, and warns where it merges."""

from __future__ import annotations

import warnings

import jax
from jax.extend import core

from lorax.interpret import low_rank
from lorax.interpret.terms.coded import Coded
from lorax.interpret.terms.dense import dense
from lorax.interpret.terms.tracked import Tracked
from lorax.interpret.uses import mapped
from lorax.interpret.uses.use import Use
from lorax.interpret.walker import Values, Walker, frozen
from lorax.types import Adapter


class MergeWarning(UserWarning):
    """`adapt` had to merge an adapted kernel instead of adding its low-rank branch."""


class CustomRuleWarning(UserWarning):
    """A function with a derivative rule of its own reads an adapted kernel."""


class Emitter:
    """The visitor that adds the low-rank branch and merges where there is none."""

    derives = True

    def __init__(self, on_merge: str, custom_rules: str | None) -> None:
        """Takes the two options of `adapt`."""
        self.on_merge, self.custom_rules = on_merge, custom_rules
        self.seen: set[tuple[str, str, str]] = set()

    def whole(self, path: str, adapter: Adapter, key: jax.Array | None) -> None:
        """Reports that a kernel is merged before the program begins."""
        if adapter.replaces:
            return  # its array is the leaf: merging costs nothing
        name = type(adapter).__name__
        self._tell(
            (path, name, ""),
            f"{path}: {name} has no form for a linear operation, so the kernel is "
            "merged: correct, but it costs a dense weight gradient",
        )
        if key is not None and getattr(adapter, "dropout", None):
            raise ValueError(
                f"{path}: dropout acts on the input of the adapter branch, but {name} "
                "has none; set dropout=0 for this target"
            )

    def decoded_for(self, path: str, adapter: Adapter) -> None:
        """Reports that a whole quantised stack is decoded for an adapter to read."""
        name = type(adapter).__name__
        self._tell(
            (path, name, "decoded"),
            f"{path}: {name} reads the kernel, but along other axes than those of the "
            "quantised leaf, so the whole stack is decoded for it; quantise the leaf "
            "with the kernels that the adapter was made with",
        )

    def _tell(self, place: tuple[str, str, str], message: str) -> None:
        """Warns once per place, or raises."""
        if self.on_merge == "error":
            raise ValueError(message + "; pass on_merge='warn' to allow it")
        if place not in self.seen:
            self.seen.add(place)
            warnings.warn(message, MergeWarning, stacklevel=3)

    def linear(self, walker: Walker, use: Use) -> Values | None:
        """Returns the frozen product with the branch of every term added."""
        with mapped.precisely(use.eqn):
            return low_rank.low_rank(walker, use)

    def branches(self, walker: Walker, use: Use) -> jax.Array | None:
        """Returns the branches alone."""
        with mapped.precisely(use.eqn):
            return low_rank.thin_only(walker, use)

    def merge(self, walker: Walker, eqn: core.JaxprEqn, view: Tracked) -> jax.Array:
        """Reports that a kernel is merged here, and merges it."""
        if not view.terms:
            return self.decoded(walker, eqn, view)
        name, where = eqn.primitive.name, walker.line(eqn)
        for path in (term.path for term in view.terms if term.behind):
            raise ValueError(
                f"{path}: the scale of its codes follows the product, but {name!r} at "
                f"{where} needs the merged kernel, which is never formed; scale the "
                "kernel before the product, or use an adapter that only adds, such as "
                "'lora', without dropout"
            )
        for path in view.paths:
            self._tell(
                (path, name, where),
                f"{path}: {name!r} at {where} is not a linear use that fits the "
                "adapter, so the kernel is merged there: correct, but it costs a dense "
                "weight gradient",
            )
        if walker.key is not None and any(term.rate for term in view.terms):
            raise ValueError(
                f"{', '.join(view.paths)}: dropout acts on the input of the adapter "
                f"branch, but {name!r} at {where} needs the merged kernel; set "
                "dropout=0 for this target or leave it out"
            )
        return dense(view)

    def decoded(self, walker: Walker, eqn: core.JaxprEqn, view: Tracked) -> jax.Array:
        """Reports that a quantised kernel is decoded here, and decodes it."""
        if not (isinstance(view.value, Coded) and view.value.paths):
            return view.array  # the program decodes here by its own code
        name, where = eqn.primitive.name, walker.line(eqn)
        first, *more = view.paths
        which = f"{first} and {len(more)} more" if more else first
        self._tell(
            (which, name, where),
            f"{which}: {name!r} at {where} reads all of a quantised kernel of shape "
            f"{list(view.value.shape)}, so it is decoded there: correct, but the dense "
            "array is kept for the backward pass",
        )
        return view.array

    def custom(
        self, walker: Walker, eqn: core.JaxprEqn, paths: tuple[str, ...]
    ) -> bool:
        """Reports that a rule meets kernels; True to add their branches beside it."""
        name, where = eqn.primitive.name, walker.line(eqn)
        place = (", ".join(paths), name, where)
        if self.custom_rules is None and place not in self.seen:
            self.seen.add(place)
            warnings.warn(
                f"{place[0]}: {name!r} at {where} has a derivative rule of its own; it "
                "is used for the frozen kernel, and the adapter's branch is "
                "differentiated as the function is written. If the rule is more than "
                "the function's derivative (a scaled or clipped gradient), pass "
                "custom_rules='merge' to lorax.adapt; if it is not, pass "
                "custom_rules='branch'",
                CustomRuleWarning,
                stacklevel=2,
            )
        return self.custom_rules != "merge"

    def returned(self, outs: Values) -> list[jax.Array]:
        """Returns the arrays of a program's results, with kernels among them merged."""
        return [dense(v) if isinstance(v, Tracked) else frozen(v) for v in outs]
