"""The visitor of `discover`: it records what happens to every leaf."""

from __future__ import annotations

import dataclasses

import jax
from jax.extend import core

from lorax.interpret.terms.tracked import Scope, Term, Tracked
from lorax.interpret.uses.use import Use
from lorax.interpret.walker import Values, Walker, frozen
from lorax.types import Axes


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """One place where a program uses a leaf.

    Attributes:
      op: "dot", "conv", "grouped_conv", "depthwise_conv" (one input channel in each
        group), "gather", "ragged_dot", or the primitive that met the leaf.
      axes: how the leaf is read and written there; None unless the use is linear.
      fast: True where `adapt` emits the low-rank branch instead of merging.
      flops: of all runs of this place in one call, on the frozen leaf.
      source: `file:line (function)`.
      matrix: True if two or more axes of the leaf that are longer than one meet the
        operation; False for one layer of a stack of biases, say.
    """

    op: str
    axes: Axes | None
    fast: bool
    flops: int
    source: str
    matrix: bool = True


Place = tuple[Scope, str, Axes | None]
"""Where a leaf is used, what for, and how: each is counted once."""


class Recorder:
    """The visitor that records what happens to every leaf.

    Attributes:
      uses: of each leaf by place; a loop's body may be walked more than once.
      equations: the leaves that each place uses in a linear operation.
    """

    derives = False  # recorded places must be those of the program

    def __init__(self) -> None:
        """Starts without uses."""
        self.uses: dict[str, dict[Place, KernelUse]] = {}
        self.equations: dict[Scope, set[str]] = {}

    def note(self, place: Scope, path: str, use: KernelUse) -> None:
        """Records one use of a leaf."""
        self.uses.setdefault(path, {})[place, use.op, use.axes] = use

    def linear(self, walker: Walker, use: Use) -> Values | None:
        """Records a linear use of whole axes; any other is a merge."""
        found = [use.axes(term) for term in use.view.terms]
        if None in found:
            return None
        place, line = (*walker.scope, use.eqn), walker.line(use.eqn)
        for term, axes in zip(use.view.terms, found, strict=True):
            paths = (term.path, *term.peers)
            flops = use.flops * walker.trips // len(paths)
            noted = KernelUse(use.op, axes, use.low_rank, flops, line)
            for path in paths:
                self.note(place, path, noted)
            self.equations.setdefault(place, set()).update(paths)
        return walker.frozen(use.eqn, use.operands)

    def branches(self, walker: Walker, use: Use) -> None:
        """Returns None: `discover` has no factors, so nothing is added."""

    def merge(self, walker: Walker, eqn: core.JaxprEqn, view: Tracked) -> jax.Array:
        """Records an operation that is not linear in the view."""
        place, line = (*walker.scope, eqn), walker.line(eqn)
        for term in view.terms:
            sized = term.sized({axis for label in term.labels for axis in label})
            met = KernelUse(eqn.primitive.name, None, False, 0, line, len(sized) > 1)
            if not self.settle(term):
                for path in (term.path, *term.peers):
                    self.note(place, path, met)
        return view.array

    def decoded(self, walker: Walker, eqn: core.JaxprEqn, view: Tracked) -> jax.Array:
        """Returns the dense value: `adapt` reports the cost."""
        return view.array

    def custom(
        self, walker: Walker, eqn: core.JaxprEqn, paths: tuple[str, ...]
    ) -> bool:
        """Returns True: `adapt` decides what to do there."""
        return True

    def settle(self, term: Term) -> bool:
        """Records a gather that turned out to be a lookup; False if it is not one."""
        if (found := term.lookup) is None:
            return False
        use = KernelUse("gather", found.axes, True, 0, found.source)
        self.note(found.place, term.path, use)
        self.equations.setdefault(found.place, set()).add(term.path)
        return True

    def returned(self, outs: Values) -> list[jax.Array]:
        """Returns the arrays of a program's results, and records lookups among them."""
        for out in outs:
            for term in out.terms if isinstance(out, Tracked) else ():
                self.settle(term)
        return [frozen(out) for out in outs]
