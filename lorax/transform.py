"""The three verbs: init makes adapters, merge folds them in, adapt applies them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from lorax import adapters as adapter_classes
from lorax import computed, inits, interpret, linalg, notices, quantized, tree
from lorax.adapters import packed
from lorax.kernels import Kernel
from lorax.selection import as_targets, select
from lorax.targets import Rule
from lorax.types import Adapter, Adapters, Axes, Base, Factors, PyTree


def init(
    key: jax.Array,
    params: PyTree,
    targets: Rule | Iterable[Rule],
    kernels: Mapping[str, Kernel] | None = None,
    stats: Mapping[str, Any] | None = None,
) -> tuple[Adapters, PyTree]:
    """Makes adapters for a parameter tree.

    At init, `merge(adapters, params)` equals the given parameters. Each adapter's key
    depends only on `key` and its path, so adding a target changes no other adapter.

    Args:
      key: a `jax.random.key`.
      params: the pretrained tree: a variables dict, an `nnx.State`, any pytree. A
        `Base` keeps its frozen arrays, and shared arrays that it already has are
        reused, so that members of a population share one base.
      targets: rules; the first match wins. See `Target`.
      kernels: from `discover`; needed by "all-linear" and for kernels that are not
        two-dimensional.
      stats: `{path: statistics}` from `calibrate`, for inits that look at data.

    Returns:
      Adapters `{path: Adapter}`, and the parameters to use with them: inits such as
      PiSSA move a part of each kernel into the adapter. If a method has frozen arrays
      (VeRA's projections), they come as a `Base`; pass it wherever params are expected.

    Raises:
      ValueError: a target that matches nothing or a leaf it cannot adapt, an unknown
        init, parameters that are not finite, or a `Base` with a different frozen array
        of the same name; the message names the path.
      KeyError: kernels discovered on another tree.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> adapters, params = init(jax.random.key(0), params, [(".*kernel", 2)])
      >>> adapters["dense/kernel"].a.shape, adapters["dense/kernel"].b.shape
      ((4, 2), (2, 3))
    """
    plain, frozen = tree.split(params)
    tree.require_pure(plain)
    targets = as_targets(targets)  # an iterator is read once
    chosen = select(plain, targets, kernels)
    notices.notice_batch_axes(chosen, kernels)
    notices.notice_left_out(targets, chosen, kernels)
    for path, (target, kernel) in chosen.items():
        inits.check(target)
        inits.require_value(kernel, target)
        inits.require_stats(path, target, stats)
    _require_finite(plain)
    shared = {
        cls: _kept(frozen, cls.shared(key, group))
        for cls, group in _by_class(chosen).items()
    }
    given = frozen
    adapters: Adapters = {}
    moved: dict[str, Any] = {}
    for path, (target, kernel) in chosen.items():
        own, cls = tree.fold_path(key, path), adapter_classes.of_target(target)
        statistics = inits.require_stats(path, target, stats)
        made, after = inits.made(own, kernel, target, statistics, shared[cls])
        adapters[path], lent = adapter_classes.lent_out(made)
        _require_same(path, given, lent)
        frozen = {**frozen, **lent}
        if after.value is not kernel.value:
            if tree.is_quantized(kernel.value):
                raise ValueError(
                    f"{path}: init={target.init!r} moves a part of the kernel into "
                    "the adapter, but the leaf is quantised; make the adapters on the "
                    "dense parameters, then quantise what lorax.init returns: "
                    "lorax.quantize(params, ...)"
                )
            moved[path] = after.value
    plain = tree.replace(plain, moved) if moved else plain
    return adapters, Base(plain, frozen) if frozen else plain


def _by_class(chosen: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """The chosen leaves, grouped by adapter class."""
    groups: dict[Any, dict[str, Any]] = {}
    for path, (target, kernel) in chosen.items():
        cls = adapter_classes.of_target(target)
        groups.setdefault(cls, {})[path] = target, kernel
    return groups


def _kept(given: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """The shared arrays, taken from the Base where it has them in the same form."""
    kind = lambda x: (x.shape, x.dtype)
    fits = lambda name, x: name in given and kind(given[name]) == kind(x)
    return {name: given[name] if fits(name, x) else x for name, x in made.items()}


def _require_same(path: str, given: Mapping[str, Any], lent: Mapping[str, Any]) -> None:
    """Raises ValueError if a Base has a different array under an adapter's name."""
    for name in given.keys() & lent.keys():
        old, new = given[name], lent[name]
        same = old is new or (old.shape, old.dtype) == (new.shape, new.dtype)
        if same and tree.is_concrete(old) and tree.is_concrete(new):
            with jax.ensure_compile_time_eval():
                same = bool(jnp.array_equal(old, new))
        if not same:
            raise ValueError(
                f"{path}: the Base given has a frozen array {name!r} of shape "
                f"{old.shape} that differs from the one the adapter needs, of shape "
                f"{new.shape}, and other adapters use it; start from its parameters "
                "alone, base.params, and keep one Base per set of adapters"
            )


def _require_finite(params: PyTree) -> None:
    """Raises ValueError naming the first leaf with NaN or infinite values."""
    with jax.ensure_compile_time_eval():  # known leaves, closed over by a jit
        finite = {
            path: jnp.stack([jnp.isfinite(part).all() for part in parts]).all()
            for path, leaf in tree.flatten(params).items()
            if (parts := list(filter(_readable, jax.tree.leaves(leaf))))
        }
    for path, whole in jax.device_get(finite).items():
        if not whole:
            raise ValueError(
                f"{path}: the leaf holds NaN or infinite values; load it again before "
                "adapting the model"
            )


def _readable(array: Any) -> bool:
    """True for floating arrays whose values can be read now."""
    return tree.is_floating(array) and tree.is_concrete(array)


def merge(adapters: Adapters, params: PyTree, *, requantize: bool = False) -> PyTree:
    """Returns plain parameters with every adapter folded in.

    This is the definition of an adapted model: products and sums in at least float32 at
    the highest precision, then one rounding to each leaf's dtype. Keep `params` if you
    need to go back.

    Args:
      adapters: `{path: Adapter}`.
      params: the tree they were made for.
      requantize: what to do with quantised leaves. False: they come out dense. True:
        each keeps its format and scales, and gets the codes nearest to the merged
        kernel (`quantized.recode`), one leaf at a time; updates of less than half a
        step between codes are lost, which `merge_report` measures. For new scales,
        use `lorax.quantize(lorax.merge(adapters, params), rules, kernels)`.

    Returns:
      A tree with the same shapes and dtypes; for a `Base`, the parameters alone.

    Raises:
      KeyError: a path that params lacks.
      ValueError: an adapter that does not fit its leaf, or that adapts a kernel which
        the program decodes from codes: these cannot hold an update.
    """
    computed.require_leaves(computed.parted(adapters, params).computed, params)
    whole, leaves = check(adapters, params)
    merged = {path: folded(a, leaves[path], requantize) for path, a in whole.items()}
    if not requantize:
        rest = {path: leaf for path, leaf in leaves.items() if path not in whole}
        packed = {path: leaf for path, leaf in rest.items() if tree.is_quantized(leaf)}
        merged |= {path: jnp.asarray(leaf) for path, leaf in packed.items()}
    return tree.replace(tree.split(params)[0], merged)


def folded(adapter: Adapter, leaf: Any, requantize: bool = False) -> Any:
    """Returns one leaf with its adapter folded in, as `merge` does it."""
    dense = jnp.asarray(leaf)
    if not (requantize and tree.is_quantized(leaf)):
        return adapter.merge(dense)
    return quantized.recode(leaf, adapter.merge(linalg.widened(dense)))


def check(adapters: Adapters, params: PyTree) -> tuple[Adapters, dict[str, Any]]:
    """Raises unless every adapter fits its leaf.

    Returns:
      The adapters with their frozen arrays filled in, and the leaves by path.
    """
    params, frozen = tree.split(params)
    tree.require_pure(params)
    values = adapters.values() if isinstance(adapters, Mapping) else [adapters]
    for value in values:
        if not isinstance(adapters, Mapping) or not hasattr(value, "factors"):
            raise TypeError(
                f"{type(value).__name__} is not an adapter: the first argument is the "
                "dict of adapters from lorax.init, the second the parameters"
            )
    leaves = tree.flatten(params)
    tree.require(adapters, leaves, "parameter tree")
    for path, adapter in adapters.items():
        if not hasattr(leaves[path], "dtype"):
            raise ValueError(f"{path}: the leaf is not an array: {leaves[path]!r}")
        adapter.check(path, leaves[path])
    bound = adapter_classes.bound
    return {path: bound(a, frozen, path) for path, a in adapters.items()}, leaves


def adapt(
    fn: Callable[..., Any],
    on_merge: Literal["warn", "error"] = "warn",
    custom_rules: Literal["branch", "merge"] | None = None,
) -> Callable[..., Any]:
    """Turns a function of `(params, ...)` into one of `(adapters, params, ...)`.

    In exact arithmetic its value is `fn(merge(adapters, params), ...)`; its cost is
    that of hand-written LoRA. `fn` is traced, and wherever a linear operation uses an
    adapted kernel, the low-rank branch is added to its result, so no kernel-sized
    update or gradient is ever formed.

    Args:
      fn: a pure function whose first argument is the parameter tree.
      on_merge: what to do where any other operation uses a kernel: "warn" once per
        place and merge it there, or "error".
      custom_rules: what to do with a kernel inside `jax.custom_vjp` or `custom_jvp`:
        "branch" keeps the function's rule for the frozen kernel and differentiates the
        low-rank branch through the body as written, which is right if the rule computes
        the true derivative; "merge" gives the rule the merged kernel, at the cost of
        its dense gradient. None: "branch", with a warning. Bodies that are not linear
        in the kernel are merged.

    Returns:
      `fn(adapters, params, *args, lora_key=None, **kwargs)`. Only adapters and params
      are traced; the other arguments reach `fn` as given. Passing `lora_key` turns
      dropout on; without it the function is deterministic.

    Raises:
      KeyError: (when called) an adapter for a path that params lacks.
      ValueError: (when called) an adapter that does not fit; a merge under "error".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jnp.eye(3)}
      >>> adapters, params = init(jax.random.key(0), params, [("w", 1)])
      >>> loss = adapt(lambda params, x: jnp.sum(jnp.tanh(x @ params["w"])))
      >>> jax.grad(loss)(adapters, params, jnp.ones((2, 3)))["w"].b.shape
      (1, 3)
    """
    if on_merge not in ("warn", "error"):
        raise ValueError(f"on_merge={on_merge!r}; choose 'warn' or 'error'")
    if custom_rules not in ("branch", "merge", None):
        raise ValueError(
            f"custom_rules={custom_rules!r}; choose 'branch', 'merge' or None"
        )
    emitter = interpret.Emitter(on_merge, custom_rules)

    @functools.wraps(fn)
    def adapted(
        adapters: Adapters,
        params: PyTree,
        *args: Any,
        lora_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        apart = computed.parted(adapters, params)
        whole, leaves = check(apart.leaves, params)
        params, held = tree.split(params)
        views, merged = _views(whole, leaves, emitter, lora_key)
        params, given = tree.replace(params, merged), (args, kwargs)
        inputs: dict[str, Any] = {**views}
        plan = interpret.NOTHING
        if apart.computed:
            known = {**leaves, **merged}
            arrays = {p: jnp.asarray(x) for p, x in known.items() if tree.is_array(x)}
            inputs = {**arrays, **views}
            program = computed.traced(fn, params, inputs, given)
            plan = computed.plan(program, leaves, apart.computed, held)
        else:
            kinds = {path: view.kind for path, view in views.items()}
            program = interpret.traced(fn, params, kinds, given, whole=False)
        walker = interpret.Walker(emitter, key=lora_key, plan=plan)
        own = [inputs[path] for path in program.paths]
        outputs = walker.run(program.jaxpr, [*own, *program.rest])
        return program.rebuild(emitter.returned(outputs))

    adapted.__signature__ = _signature(fn)  # type: ignore[attr-defined]
    return adapted


def _views(
    adapters: Adapters,
    leaves: Mapping[str, Any],
    emitter: interpret.Emitter,
    key: jax.Array | None,
) -> tuple[dict[str, interpret.Tracked], dict[str, jax.Array]]:
    """The leaves to follow, and those without factors, merged before the walk."""
    views = {
        path: interpret.unadapted(path, leaf)
        for path, leaf in leaves.items()
        if tree.is_quantized(leaf)
    }
    merged: dict[str, jax.Array] = {}
    for path, adapter in adapters.items():
        leaf = leaves[path]
        factors = _factors(adapter, leaf)
        if tree.is_quantized(leaf) and not packed.by_kernel(adapter, leaf):
            emitter.decoded_for(path, adapter)
        if factors is None:
            emitter.whole(path, adapter, key)
            views.pop(path, None)
            merged[path] = adapter.merge(jnp.asarray(leaf))
        else:
            axes: Axes = cast(Any, adapter).axes  # every class with factors has axes
            rate = getattr(adapter, "dropout", 0.0)
            view = interpret.watch(path, interpret.as_leaf(leaf))
            views[path] = view.adapted(factors, axes, rate)
    return dict(sorted(views.items())), merged


def _factors(adapter: Adapter, leaf: Any) -> Factors | None:
    """An adapter's factors beside a leaf."""
    if tree.is_quantized(leaf):
        return packed.factors(adapter, leaf)
    return adapter.factors(jnp.asarray(leaf))


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    """The adapted function's signature, so that jax.jit finds arguments by name."""
    kinds = inspect.Parameter
    try:
        given = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a builtin
        given = [kinds("args", kinds.VAR_POSITIONAL)]
    if taken := {"adapters", "lora_key"} & {parameter.name for parameter in given}:
        raise ValueError(
            f"the function has a parameter named {taken.pop()!r}, but adapt adds one "
            "of that name; rename it"
        )
    by_name = not given or given[0].kind is kinds.POSITIONAL_OR_KEYWORD
    first = kinds.POSITIONAL_OR_KEYWORD if by_name else kinds.POSITIONAL_ONLY
    named = len(given) - any(p.kind is kinds.VAR_KEYWORD for p in given)
    key = kinds("lora_key", kinds.KEYWORD_ONLY, default=None)
    return inspect.Signature(
        [kinds("adapters", first), *given[:named], key, *given[named:]]
    )
