"""Adapters as an `nnx.Module`, for training loops written with `flax.nnx`.

    adapted = Adapted.init(jax.random.key(0), model, targets, tokens)
    optimizer = nnx.Optimizer(adapted, on_adapters(tx), wrt=nnx.Param)
    loss, grads = nnx.value_and_grad(loss_fn)(adapted)

Of an adapted module `nnx.Param` is the adapters alone, so that `nnx.value_and_grad`,
`nnx.state` and `nnx.Optimizer` need no filter of their own. The base's parameters are
`Frozen`, all other state (counts, statistics, caches) stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx

from lorax import kernels, transform, tree
from lorax.targets import Target
from lorax.types import Adapters, Base, PyTree


class Frozen(nnx.Variable[Any]):
    """A parameter of the base; no gradient is taken of it."""


class Adapted(nnx.Module):
    """A module with adapters on its kernels; called as the module itself.

    Attributes:
      adapters: an `nnx.Param` that holds them, `{path: Adapter}`.
      model: the module; its parameters are `Frozen`.
      deterministic: no dropout of the adapters; `train()` and `eval()` set it.
    """

    def __init__(
        self,
        model: nnx.Module,
        adapters: Adapters,
        params: PyTree,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Joins what `lorax.init` returns with the module.

        Args:
          model: any `nnx.Module`; it is left as it is, and shares its arrays.
          adapters: of its parameters.
          params: `nnx.state(model, nnx.Param)`, as `lorax.init` returns it: with
            inits that move the base, or frozen arrays beside it, not the model's own.
          rngs: for the dropout of adapters that have one.

        Raises:
          KeyError: an adapter of a path that the module lacks.
          ValueError: adapters have dropout, and there are no `rngs`.
        """
        plain, frozen = tree.split(params)
        tree.require(adapters, tree.flatten(plain), "module")
        dropout = any(getattr(a, "dropout", 0.0) for a in adapters.values())
        if dropout and rngs is None:
            raise ValueError(
                "the adapters have dropout: give rngs=nnx.Rngs(0) to draw it from"
            )
        graph, _, rest = _apart(model, nnx.Param)
        self.model = nnx.merge(graph, _retyped(plain, Frozen), rest, copy=True)
        self.adapters = nnx.Param(adapters)
        self.beside = Frozen(dict(frozen)) if frozen else None
        self.rngs = rngs if dropout else None
        self.deterministic = False

    @classmethod
    def init(
        cls,
        key: jax.Array,
        model: nnx.Module,
        targets: Sequence[Target],
        *args: Any,
        rngs: nnx.Rngs | None = None,
        **kwargs: Any,
    ) -> Adapted:
        """Draws adapters; `args` and `kwargs` are an example of the module's own.

        Args:
          key: as for `lorax.init`.
          model: any `nnx.Module`.
          targets: what is adapted, and how.
          *args: read for their shapes.
          rngs: for the dropout of adapters that have one.
          **kwargs: passed to the module.

        Raises:
          ValueError: as `lorax.init`.
        """
        fn, params, rest = functional(model, **kwargs)
        found = kernels.discover(fn, params, rest, *args)
        return cls(model, *transform.init(key, params, targets, found), rngs=rngs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module, its kernels adapted; what it changed of its state stays."""
        graph, base, rest = _apart(self.model, Frozen)
        key = None
        if self.rngs is not None and not self.deterministic:
            key = self.rngs.lora()
        params = self._with_beside(base)
        run = transform.adapt(_called(graph, kwargs))
        out, rest = run(self.adapters.get_value(), params, rest, *args, lora_key=key)
        nnx.update(self.model, rest)
        return out

    def merged(self) -> nnx.Module:
        """Returns the module with merged kernels, its parameters `nnx.Param` again."""
        graph, base, rest = _apart(self.model, Frozen)
        params = transform.merge(self.adapters.get_value(), self._with_beside(base))
        plain, _ = tree.split(params)
        return nnx.merge(graph, _retyped(plain, nnx.Param), rest, copy=True)

    def _with_beside(self, base: PyTree) -> PyTree:
        return base if self.beside is None else Base(base, self.beside.get_value())


def functional(
    model: nnx.Module, **kwargs: Any
) -> tuple[Callable[..., Any], PyTree, PyTree]:
    """Returns `fn`, parameters and other state for `lorax.discover` and data inits.

    `fn(params, rest, *args)` is the module's output, and what it made of `rest`.
    """
    graph, params, rest = _apart(model, nnx.Param)
    return _called(graph, kwargs), params, rest


def on_adapters(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation of adapters as one of an adapted module's `nnx.Param`.

    `nnx.Optimizer` hands over an `nnx.State`; methods of `lorax.optim` read adapters.

    Args:
      tx: any optax transformation.

    Raises:
      ValueError: (by init and update) the state is not that of an `Adapted`.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return inner.init(_adapters_of(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        own = None if params is None else _adapters_of(params)
        moved, state = inner.update(_adapters_of(updates), state, own, **extra)
        outer = jax.tree.structure(updates)
        return jax.tree.unflatten(outer, jax.tree.leaves(moved)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _apart(module: nnx.Module, kind: type) -> tuple[Any, PyTree, PyTree]:
    """The graph, the variables of a kind, and all others."""
    graph, *states = nnx.split(module, kind, ...)
    params, rest = states
    return graph, params, rest


def _called(graph: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """A pure function of a module's parameters and its other state."""

    def fn(params: Any, rest: Any, *args: Any) -> Any:
        module = nnx.merge(graph, params, rest, copy=True)
        out = module(*args, **kwargs)
        return out, nnx.state(module, nnx.Not(nnx.Any(nnx.Param, Frozen)))

    return fn


def _retyped(params: PyTree, kind: type[nnx.Variable[Any]]) -> PyTree:
    """The same values in variables of another kind."""

    def variable(leaf: Any) -> Any:
        return kind(leaf.get_value(), **leaf.get_metadata())

    return jax.tree.map(variable, params, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _adapters_of(state: Any) -> Adapters:
    """The adapters in the `nnx.State` of an adapted module."""
    named = isinstance(state, Mapping) and set(state) == {"adapters"}
    held: Any = state["adapters"] if named else None
    held = held.get_value() if _is_variable(held) else held  # update's have none
    if not isinstance(held, Mapping):
        raise ValueError(
            "on_adapters acts on the nnx.Param of a lorax.interop.nnx.Adapted; write "
            "nnx.Optimizer(adapted, on_adapters(tx), wrt=nnx.Param)"
        )
    return dict(held)
