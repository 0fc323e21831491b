"""The pass over a program that finds the kernels it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lorax import tree
from lorax.interpret.computed.behind import readers_of, to_scale
from lorax.interpret.computed.made import (
    JOINS,
    Made,
    Product,
    Scale,
    Site,
    is_real,
    is_scaled,
    is_view,
    line_of,
    scale_of,
    stacked,
    with_sites,
)
from lorax.interpret.rules import unchanged
from lorax.interpret.terms.tracked import Scope
from lorax.interpret.uses.equations import Bodies, Body, aval, bodies, opened
from lorax.interpret.uses.plan import Plan

ENTERED = "jit pjit remat2 checkpoint closed_call core_call cond while scan".split()
KERNELS = {
    "dot_general": (0, 1),
    "conv_general_dilated": (1,),
    "ragged_dot_general": (1,),
}
"""Linear operations, and the operands that may be kernels."""
INTEGERS = (
    "multiplies integers by integers: the activation is quantised as well, but an "
    "adapter branch would read it unquantised; multiply floats, as in "
    "x @ (q * scale) or (x @ q.astype(x.dtype)) * scale, or leave the leaf out"
)
CAST = "cast the kernel to the dtype of the activation first"
NAME = (
    "name the kernel itself, checkpoint_name(kernel, 'layers/kernel'), and adapt that"
)


Values = Sequence[Made | None]


class Flow:
    """A pass over a program; None stands for a value that depends on its inputs."""

    def __init__(
        self,
        leaves: Mapping[str, Any],
        wanted: Collection[str] | None = None,
        skipped: Collection[str] = (),
    ) -> None:
        """Starts without products.

        Args:
          leaves: arrays, shapes and quantised leaves, by path.
          wanted: paths and names; None for all.
          skipped: names to leave alone.
        """
        self.coded = {p: leaf for p, leaf in leaves.items() if tree.is_coded(leaf)}
        self.sizes = {
            path: leaf.size if path in self.coded or tree.is_floating(leaf) else 0
            for path, leaf in leaves.items()
        }
        self.wanted, self.skipped = wanted, skipped
        self.keys: dict[Hashable, int] = {}
        self.products: dict[Scope, Product] = {}
        self.refused: dict[str, str] = {}

    def key(self, *how: Hashable) -> int:
        """Returns the number of a value that is made this way."""
        return self.keys.setdefault(how, len(self.keys))

    def constant(self, which: Hashable) -> Made:
        """Returns what is known about a constant."""
        return Made(self.key("constant", which))

    def leaf(self, path: str) -> Made:
        """Returns what is known about a leaf."""
        scale: Scale = "done"
        if path in self.coded:
            scale = "possible" if tree.is_floating(self.coded[path]) else "needed"
        return Made(
            self.key("leaf", path), frozenset([path]), scale=scale, is_leaf=True
        )

    def run(self, body: Body, given: Values, scope: Scope) -> list[Made | None]:
        """Returns what is known about a jaxpr's results."""
        jaxpr = opened(body)
        inputs = [*jaxpr.constvars, *jaxpr.invars]
        own = map(self.constant, inputs[: len(inputs) - len(given)])
        env = dict(zip(inputs, [*own, *given], strict=True))

        def read(atom: jax.core.Atom) -> Made | None:
            if isinstance(atom, core.Literal):
                return self.constant((str(atom.val), str(atom.aval)))
            return env[atom]

        for eqn in jaxpr.eqns:
            outs = self.step(eqn, [read(v) for v in eqn.invars], (*scope, eqn))
            env.update(zip(eqn.outvars, outs, strict=True))
        readers = readers_of(jaxpr)
        for eqn in jaxpr.eqns:
            if found := self.products.get((*scope, eqn)):
                chain, scales = to_scale(eqn, readers, env)
                self.products[*scope, eqn] = Product(
                    eqn,
                    found.sites,
                    after=tuple((*scope, each) for each in chain),
                    scale=tuple(value.key for value in scales),
                    parts=frozenset().union(*(value.leaves for value in scales)),
                )
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: core.JaxprEqn, values: Values, place: Scope) -> Values:
        """Returns what is known about an equation's results."""
        name = eqn.primitive.name
        if name in ENTERED:
            return self.enter(eqn, bodies(eqn), values, place)
        if name == "optimization_barrier":
            return values
        made = [value for value in values if value is not None]
        if name in KERNELS and any(map(self.paths, made)):
            self.product(eqn, values, place)
            return [None] * len(eqn.outvars)
        if len(made) < len(values) or eqn.effects:
            self.refuse(made, f"{name!r} at {line_of(eqn)} is not linear in it")
            return [None] * len(eqn.outvars)
        return [self.made(eqn, made, place, i) for i, _ in enumerate(eqn.outvars)]

    def enter(
        self, eqn: core.JaxprEqn, inside: Bodies, values: Values, place: Scope
    ) -> Values:
        """Returns what is known about the results of an equation's bodies."""
        name, handed = eqn.primitive.name, unchanged.handed_on(eqn)
        given, first = [*values[inside.skipped :]], inside.consts + inside.carried
        for i in range(inside.consts, first):
            if handed[i - inside.consts] != inside.skipped + i:
                given[i] = None
        if name == "scan":
            given[first:] = [self.layer(value, place) for value in given[first:]]
        before = len(self.products)
        found = [self.run(body, given, place) for body in inside.jaxprs]
        kept = [None if at is None else values[at] for at in handed]
        if name not in ("scan", "while", "cond"):
            return [k or f for k, f in zip(kept, found[0], strict=True)]
        made = [value for value in values if value is not None]
        if len(made) < len(values) or eqn.effects or len(self.products) > before:
            return kept
        return [self.made(eqn, made, place, i) for i, _ in enumerate(handed)]

    def layer(self, value: Made | None, loop: Scope) -> Made | None:
        """Returns what is known about one step of a scanned value."""
        if value is None:
            return None
        key = self.key("layer", value.key)
        return dataclasses.replace(value, key=key, loops=(*value.loops, loop))

    def made(
        self, eqn: core.JaxprEqn, given: Sequence[Made], place: Scope, result: int
    ) -> Made:
        """Returns what is known about a result made of known values alone."""
        kind, name = aval(eqn.outvars[result]), eqn.primitive.name
        how = place if name in ENTERED else (name, str(eqn.params))
        coded = [value for value in given if self.paths(value)]
        steps = [frozenset([place]), *(v.decoding for v in coded)] if coded else []
        made = Made(
            key=self.key(how, result, *(value.key for value in given)),
            leaves=frozenset().union(*(value.leaves for value in given)),
            loops=tuple(sorted({each for v in given for each in v.loops}, key=len)),
            decoding=frozenset().union(*steps),
            scale=scale_of(eqn, given, coded),
        )
        if not made.leaves:
            return made
        sites = tuple(site for value in coded for site in value.sites)
        if name == "name" and self.names(eqn.params["name"], given[0], kind):
            made = dataclasses.replace(made, scale="done")  # as the name says
            return with_sites(made, [eqn.params["name"]], place, result, kind)
        if is_view(eqn):
            made = dataclasses.replace(made, is_leaf=given[0].is_leaf)
            if sites:
                return dataclasses.replace(
                    made, sites=sites, decoding=given[0].decoding
                )
        apart = len({site.path for site in sites}) == len(sites) > 1
        if name in JOINS and apart and all(value.sites for value in coded):
            return dataclasses.replace(made, sites=sites)
        return with_sites(made, self.owners(made.leaves), place, result, kind)

    def names(self, name: str, value: Made, kind: jax.core.ShapedArray) -> bool:
        """True where `checkpoint_name` names a kernel that is not a leaf itself."""
        if name in self.skipped or (
            self.wanted is not None and name not in self.wanted
        ):
            return False
        if not value.leaves or not is_real(kind) or value.is_leaf:
            return False
        if name in self.sizes and name not in value.leaves:
            self.refused[name] = (
                "checkpoint_name gives the path of this leaf to a value that is not "
                "made of it; rename one of the two"
            )
        return name not in self.sizes or name in self.coded

    def owners(self, leaves: Collection[str]) -> list[str]:
        """The largest leaf if it holds codes; several if they are of the same size."""
        size = max((self.sizes[path] for path in leaves), default=0)
        largest = [path for path in sorted(leaves) if self.sizes[path] == size]
        return largest if {*largest} <= self.coded.keys() else []

    def paths(self, value: Made) -> list[str]:
        """The paths of the kernels that a value is, holds, or may yet become."""
        return [site.path for site in value.sites] or self.owners(value.leaves)

    def refuse(self, values: Iterable[Made], reason: str) -> None:
        """Records why kernels that some values are or hold cannot be adapted."""
        for value in values:
            for path in self.paths(value):
                self.refused.setdefault(path, reason)

    def product(self, eqn: core.JaxprEqn, values: Values, place: Scope) -> None:
        """Records a linear operation, one operand of which is a kernel."""
        name, line = eqn.primitive.name, line_of(eqn)
        found = [(i, v) for i, v in enumerate(values) if v and self.paths(v)]
        (at, value), kinds = found[0], [aval(v) for v in eqn.invars]
        raw = with_sites(value, self.paths(value), place, 0, kinds[at])
        self.products[place] = Product(eqn, value.sites or raw.sites)
        if len(found) > 1:
            self.refuse((v for _, v in found), f"{line} multiplies two kernels")
        elif at not in KERNELS[name]:
            self.refuse([value], f"{name!r} at {line} reads it as an activation")
        elif not any(jnp.issubdtype(kind.dtype, jnp.floating) for kind in kinds[:2]):
            self.refuse([value], f"{line} {INTEGERS}")
        elif not is_real(kinds[at]):
            self.refuse([value], f"{line} multiplies by {kinds[at].dtype}; {CAST}")

    def plan(self) -> Plan:
        """Returns what was found, as a plan for the walker."""
        groups: dict[str, list[Site]] = {}
        first: dict[str, tuple[Product, Site]] = {}
        for product in self.products.values():
            for site in product.sites:
                groups.setdefault(site.path, []).append(site)
                self.judge(product, site, *first.setdefault(site.path, (product, site)))
        if self.wanted is not None:
            groups = {path: groups[path] for path in self.wanted if path in groups}
        good = {path for path in groups if path not in self.refused}
        roots: dict[Scope, dict[int, str]] = {}
        cuts: dict[Scope, dict[str, None]] = {}
        decoding: set[Scope] = set()
        for site in (site for path in good for site in groups[path]):
            roots.setdefault(site.place, {})[site.result] = site.path
            decoding |= site.made.decoding
            for loop in site.made.loops:
                cuts.setdefault(loop, {})[site.path] = None
        behind = {p for p in good if first[p][0].after and not is_scaled(first[p][1])}
        scaled = {
            place: product.after
            for place, product in self.products.items()
            if any(site.path in behind for site in product.sites)
        }
        return Plan(
            kernels={path: stacked(sites[0]) for path, sites in groups.items()},
            leaves={
                path: tuple(sorted(site.made.leaves | product.parts))
                for path, (product, site) in first.items()
                if path in groups
            },
            refused=self.refused,
            roots=roots,
            decoding=frozenset(decoding),
            inside=frozenset(
                place[:i] for place in {*roots, *decoding} for i in range(1, len(place))
            ),
            cuts={loop: tuple(paths) for loop, paths in cuts.items()},
            scaled=frozenset(scaled),
            behind=frozenset(behind),
            scales={p: p == chain[-1] for chain in scaled.values() for p in chain},
        )

    def judge(self, product: Product, site: Site, other: Product, first: Site) -> None:
        """Records why a kernel that a product reads cannot be adapted."""
        here = line_of(product.eqn)
        alike = [s.path for s in product.sites if s[1:3] == site[1:3]]
        if len(alike) > 1:
            reason = (
                f"{here} reads a kernel made of {' and '.join(alike)} alike; {NAME}"
            )
        elif site.made.key != first.made.key or (
            not is_scaled(site) and product.scale != other.scale
        ):
            lines = f"{line_of(other.eqn)} and at {here}"
            reason = f"it stands for two different kernels, at {lines}; {NAME}"
        elif site.made.scale == "needed" and not product.after:
            reason = (
                f"{here} multiplies by unscaled codes, and no scale follows directly; "
                f"scale the kernel, or the product right after it, or {NAME}"
            )
        else:
            return
        self.refused.setdefault(site.path, reason)
