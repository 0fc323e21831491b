"""Adapters as an `nnx.Module`, for training loops written with `flax.nnx`.

    adapted = Adapted.init(jax.random.key(0), model, targets, tokens)
    optimizer = nnx.Optimizer(adapted, on_adapters(tx), wrt=nnx.Param)
    loss, grads = nnx.value_and_grad(loss_fn)(adapted)

In an adapted module only the adapters are `nnx.Param`, so `nnx.value_and_grad`,
`nnx.state` and `nnx.Optimizer` need no special filters. The base's parameters become
`Frozen`; all other state (counts, statistics, caches) keeps its type.
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
    """A parameter of the base, for which no gradient is taken."""


class Adapted(nnx.Module):
    """A module with adapters on its kernels; call it like the module itself.

    Attributes:
      adapters: an `nnx.Param` that holds `{path: Adapter}`.
      model: the module; its parameters are `Frozen`.
      deterministic: disables the adapters' dropout; `train()` and `eval()` set it.
    """

    def __init__(
        self,
        model: nnx.Module,
        adapters: Adapters,
        params: PyTree,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Combines the module with what `lorax.init` returned.

        Args:
          model: any `nnx.Module`; it is not modified, and its arrays are shared.
          adapters: of its parameters.
          params: the params that `lorax.init` returned for `nnx.state(model,
            nnx.Param)`. If an init changed the base, or there are frozen arrays, they
            are not the model's own.
          rngs: for the adapters' dropout, if they have any.

        Raises:
          KeyError: the module lacks an adapter's path.
          ValueError: adapters have dropout, but there are no `rngs`.
        """
        plain, frozen = tree.split(params)
        tree.require(adapters, tree.flatten(plain), "module")
        dropout = any(getattr(a, "dropout", 0.0) for a in adapters.values())
        if dropout and rngs is None:
            raise ValueError(
                "the adapters have dropout: pass rngs=nnx.Rngs(0) to draw from"
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
        """Initialises adapters; `args` and `kwargs` are example inputs of the module.

        Args:
          key: as for `lorax.init`.
          model: any `nnx.Module`.
          targets: what to adapt, and how.
          *args: example arguments, used for their shapes.
          rngs: for the adapters' dropout, if they have any.
          **kwargs: passed to the module.

        Raises:
          ValueError: as for `lorax.init`.
        """
        fn, params, rest = functional(model, **kwargs)
        found = kernels.discover(fn, params, rest, *args)
        return cls(model, *transform.init(key, params, targets, found), rngs=rngs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with adapted kernels, keeping its changes to its state."""
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
        """Returns the module with merged kernels and parameters as `nnx.Param`."""
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

    `fn(params, rest, *args)` returns the module's output and its updated state.
    """
    graph, params, rest = _apart(model, nnx.Param)
    return _called(graph, kwargs), params, rest


def on_adapters(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation of adapters to act on an adapted module's `nnx.Param`.

    `nnx.Optimizer` passes an `nnx.State`, while methods of `lorax.optim` read adapters.

    Args:
      tx: any optax transformation.

    Raises:
      ValueError: (in init and update) the state is not that of an `Adapted`.
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
    """The graph, the variables of one kind, and all others."""
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
    held = held.get_value() if _is_variable(held) else held  # updates have no variable
    if not isinstance(held, Mapping):
        raise ValueError(
            "on_adapters works on the nnx.Param of a lorax.interop.nnx.Adapted; write "
            "nnx.Optimizer(adapted, on_adapters(tx), wrt=nnx.Param)"
        )
    return dict(held)
