"""Turns the values of `config.optimizer` into an optax transformation.

`config.optimizer.name` is one of READY, to which `register` adds, or "chain":

    config.optimizer.name = "chain"
    config.optimizer.chain = (
        ("clip", 1.0), ("lora_pro", {"damping": 0.1}), ("adam", {"b2": 0.99}),
        ("lora_plus", 16.0), ("spectral_decay", 0.1))
    config.optimizer.wrap = (("adalora", {"target_budget": 96, ...}), ("accumulate", 4))

A link is a name and its arguments: a number for the first one, or a dict by name. The
learning rate is inserted where it belongs. Links must be in the order of STAGES;
wrappers go around the whole chain, the first innermost.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
import optax.contrib

from lorax import optim, registry

STAGES = ("clip", "pair", "moments", "ratio", "decay", "learning_rate", "project")


class Link(NamedTuple):
    """A transformation of a chain, and the stage where it belongs."""

    stage: str
    make: Callable[..., Any]


def _muon_of_layers(
    learning_rate: Any,
    adam_learning_rate: Any,
    b1: float,
    b2: float,
    weight_decay: float,
) -> Any:
    return optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_learning_rate=adam_learning_rate,
        muon_weight_dimension_numbers=_layer_matrices,
    )


def _adamw(
    learning_rate: Any, b1: float, b2: float, weight_decay: float, **options: Any
) -> Any:
    return optax.adamw(
        learning_rate, b1, b2, weight_decay=weight_decay, mask=_decayed, **options
    )


def scale_by_path(
    factors: Sequence[tuple[str, Any]],
) -> optax.GradientTransformation:
    """Multiplies the updates of each path by a factor, as a learning rate of its own.

    Args:
      factors: pairs (regular expression of a path, factor); the first that matches the
        whole path wins, and the updates of other paths are unchanged.
    """

    def factor(path: str) -> Any:
        found = (own for pattern, own in factors if re.fullmatch(pattern, path))
        return next(found, 1.0)

    def scaled(updates: Any, params: Any) -> Any:
        del params
        return {
            path: jax.tree.map(lambda u, path=path: factor(path) * u, update)
            for path, update in updates.items()
        }

    return optax.stateless(scaled)


def _sgd(momentum: float | None = None) -> Any:
    return optax.identity() if momentum is None else optax.trace(momentum)


LINKS = {
    "clip": Link("clip", optax.clip_by_global_norm),
    "noise_scale": Link("clip", optim.track_noise_scale),
    "lora_pro": Link("pair", optim.scale_by_lora_pro),
    "gram": Link("pair", optim.scale_by_gram),
    "lora_fa": Link("pair", optim.scale_by_lora_fa),
    "reflora": Link("pair", optim.scale_by_reflora),
    "sgd": Link("moments", _sgd),
    "adam": Link("moments", optax.scale_by_adam),
    "muon_factors": Link("moments", optim.scale_by_muon_factors),
    "lora_rite": Link("moments", optim.scale_by_lora_rite),
    "riemannion": Link("moments", optim.scale_by_riemannion),
    "lora_plus": Link("ratio", optim.scale_by_lora_plus),
    "scale_by_path": Link("ratio", scale_by_path),
    "weight_decay": Link("decay", optim.add_decayed_weights),
    "spectral_decay": Link("decay", optim.add_decayed_spectral_norm),
    "clip_spectral": Link("project", optim.clip_spectral_norm),
    "retract": Link("project", optim.retract),
}
"""Transformations by the name that a chain uses for them."""

READY = {
    "adamw": _adamw,
    "sgd": optax.sgd,
    "lora_plus": optim.lora_plus,
    "lora_pro": optim.lora_pro,
    "lora_fa": optim.lora_fa,
    "riemannian": optim.riemannian,
    "lora_rite": optim.lora_rite,
    "riemannion": optim.riemannion,
    "reflora": optim.reflora,
    "muon_factors": optim.muon,
    "muon": _muon_of_layers,
}
"""Whole optimisers by name, `(learning_rate, **options)`; "muon" is for whole trees."""

SEES_SHAPES = {"muon"}
"""Names in READY whose step depends on the shapes of factors, not only on values:
members of a population are then not padded to a common rank."""

WRAPPERS = {"adalora": optim.adalora, "accumulate": optax.MultiSteps}
"""Wrappers of an optimiser by name, `(inner, **options)`."""

FIELDS = ("b1", "b2", "weight_decay", "adam_learning_rate")
"""Fields of the config that are passed to a READY optimiser if it takes them."""

SCHEDULE = ("learning_rate", "warmup_steps", "final_share", "clip_norm", "tuned")
BUILD = ("name", "options", "chain", "wrap", "rates", "steps", "batch_size")
"""Fields of the config that every optimiser shares; any other is its argument."""


def register(
    name: str, make: Callable[..., Any] | None = None, *, sees_shapes: bool = False
) -> Any:
    """Registers an optimiser under a name, for `config.optimizer.name`.

    Its arguments are fields of `config.optimizer` in your own config, such as
    `config.optimizer.momentum = 0.9`, or are given in `config.optimizer.options`.

    Args:
      name: what the config says.
      make: `(learning_rate, **arguments) -> optax transformation`; the rate is a
        schedule. None: returns a decorator.
      sees_shapes: whether its step depends on the shape of a factor, as Muon's does;
        the ranks of a population are then not padded.

    Returns:
      The function, or the decorator.

    Raises:
      ValueError: the name is taken by another function, or is "chain".

    Example:
      >>> make = lambda learning_rate, momentum=0.9: optax.sgd(learning_rate, momentum)
      >>> register("heavy_ball", make) is make
      True
      >>> del READY["heavy_ball"]
    """
    if make is None:
        return functools.partial(register, name, sees_shapes=sees_shapes)
    if name == "chain":
        raise ValueError(
            "optimiser name 'chain' belongs to chains of links; register this one "
            "under another"
        )
    registry.require_free("optimiser", name, READY.get(name), make)
    READY[name] = make
    if sees_shapes:
        SEES_SHAPES.add(name)
    return make


def make_optimizer(
    learning_rate: float, steps: int, config: ml_collections.ConfigDict
) -> Any:
    """Returns the optimiser, with linear warm-up and cosine decay of the learning rate.

    The rate decays to `final_share` of the peak. The train step can clip by global norm
    too (`clip_norm`).

    Args:
      learning_rate: the peak; under `optax.inject_hyperparams` a traced number.
      steps: length of the schedule.
      config: `config.optimizer`, or `config.model.pretrain`. `options`, pairs `(name,
        value)`, are further arguments of a READY optimiser and take precedence over
        fields.

    Raises:
      ValueError: an unknown name, a chain in another order than STAGES, or a field that
        the optimiser does not take.
    """
    warmup = min(config.warmup_steps, steps // 2)
    unit = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, warmup, steps, config.final_share
    )

    def schedule(peak: Any) -> optax.Schedule:
        return lambda step: peak * unit(step)  # the peak may be traced

    factors = _factors(config, learning_rate)
    own = [f for f in config if f not in (*FIELDS, *SCHEDULE, *BUILD)]
    if config.name == "chain":
        if own:
            raise ValueError(
                f"optimizer.{own[0]}={config[own[0]]!r}: the links of a chain hold its "
                "arguments; remove the field"
            )
        tx = make_chain(config.get("chain", ()), schedule(learning_rate), factors)
    elif config.name in READY:
        make = READY[config.name]
        takes = inspect.signature(make).parameters
        given = dict(config.get("options", ()))
        if config.get("chain", ()):
            raise ValueError(
                f"optimizer.chain is given, but optimizer.name={config.name!r} does "
                "not read it; set optimizer.name to 'chain', or the chain to ()"
            )
        _require_options("optimizer.options", config.name, make, given)
        _require_options("optimizer", config.name, make, own)
        fields = {f: config[f] for f in FIELDS if f in config and f in takes}
        fields |= {f: config[f] for f in own}
        if config.name == "lora_pro" and given.get("mode", "rowcol") == "rowcol":
            fields.pop("b1", None)  # no momentum, unless `options` asks for it
        options = {**fields, **given}
        if options.get("adam_learning_rate") is not None:
            options["adam_learning_rate"] = schedule(options["adam_learning_rate"])
        tx = make(schedule(learning_rate), **options)
        tx = optax.chain(tx, scale_by_path(factors)) if factors else tx
    else:
        raise ValueError(
            f"optimizer.name={config.name!r} is not one of {', '.join(READY)}, chain; "
            "register an optimiser of your own in a module of config.run.plugins"
        )
    for name, given in config.get("wrap", ()):
        tx = _wrapped(tx, name, given, steps)
    return tx


def _factors(
    config: ml_collections.ConfigDict, learning_rate: Any
) -> list[tuple[str, Any]]:
    """Returns the factors on steps that give the paths of `rates` their own peaks."""
    rates = config.get("rates", ())
    if rates and config.name in ("muon", "muon_factors"):
        raise ValueError(
            f"optimizer.rates={rates!r}: with optimizer.name={config.name!r}, the "
            "leaves that Muon does not train follow optimizer.adam_learning_rate; set "
            "that instead"
        )
    return [(path, own / learning_rate) for path, own in rates]


def make_chain(
    links: Any, learning_rate: Any, factors: Sequence[tuple[str, Any]] = ()
) -> optax.GradientTransformation:
    """Chains links, and inserts the learning rate.

    Args:
      links: pairs `(name, arguments)`.
      learning_rate: a number or a schedule.
      factors: on the learning rate, by path, as for `scale_by_path`.

    Raises:
      ValueError: no links, an unknown name, or links that are not in the order of
        STAGES.
    """
    if not links:
        raise ValueError(
            "optimizer.chain is empty: give links such as ('adam', {}), or another "
            "optimizer.name"
        )
    made: list[tuple[str, Any]] = []
    for name, given in links:
        if name not in LINKS:
            raise ValueError(
                f"optimizer.chain: {name!r} is not one of {', '.join(LINKS)}"
            )
        made.append((name, _link(name, given)))
    stages = [STAGES.index(LINKS[name].stage) for name, _ in made]
    if stages != sorted(stages):
        right = sorted(made, key=lambda link: STAGES.index(LINKS[link[0]].stage))
        raise ValueError(
            f"optimizer.chain: {', '.join(name for name, _ in made)} is not in the "
            f"order of stages ({' -> '.join(STAGES)}); write "
            f"{', '.join(name for name, _ in right)}"
        )
    last = STAGES.index("learning_rate")
    before = [tx for (_, tx), stage in zip(made, stages, strict=True) if stage < last]
    after = [tx for (_, tx), stage in zip(made, stages, strict=True) if stage > last]
    if factors:
        before.append(scale_by_path(factors))
    rate = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(*before, rate, *after)


def _wrapped(tx: Any, name: str, given: Any, steps: int) -> Any:
    if name not in WRAPPERS:
        raise ValueError(
            f"optimizer.wrap: {name!r} is not one of {', '.join(WRAPPERS)}"
        )
    if isinstance(tx, optax.MultiSteps):
        raise ValueError(
            f"optimizer.wrap: {name!r} around 'accumulate' would count microbatches; "
            "put 'accumulate' last"
        )
    options = dict(given) if isinstance(given, Mapping) else {}
    _require_options("optimizer.wrap", name, WRAPPERS[name], options)
    if name == "adalora":
        if not isinstance(given, Mapping):
            raise ValueError(
                f"optimizer.wrap: ('adalora', {given!r}): give its arguments as a "
                "dict, such as {'target_budget': 96, 'initial_warmup': 2}"
            )
        return optim.adalora(tx, **{"total_steps": steps, **options})
    return optax.MultiSteps(tx, **(options or {"every_k_schedule": given}))


def _link(name: str, given: Any) -> Any:
    """Makes a link from its arguments: a number for the first one, or a dict."""
    make = LINKS[name].make
    if given is None:
        return make()
    if not isinstance(given, Mapping):
        return make(given)
    _require_options("optimizer.chain", name, make, given)
    return make(**given)


def _require_options(
    where: str, name: str, make: Callable[..., Any], given: Iterable[str]
) -> None:
    """Raises ValueError for an argument that a transformation does not take."""
    takes = inspect.signature(make).parameters
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return
    known = [known for known in takes if known != "learning_rate"]
    if unknown := [option for option in given if option not in known]:
        raise ValueError(
            f"{where}: {name!r} has no option {unknown[0]!r}; it has "
            f"{', '.join(known) or 'none'}"
        )


def _decayed(adapters: dict[str, Any]) -> dict[str, Any]:
    """Marks factors and whole kernels to decay, not magnitudes, norms and biases."""
    factors = optim.decay_mask(adapters)

    def mask(path: str, adapter: Any) -> Any:
        if "value" not in adapter.roles.values():
            return factors[path]
        return adapter.replace(value=not path.endswith(("/scale", "/bias")))

    return {path: mask(path, adapter) for path, adapter in adapters.items()}


def _layer_matrices(adapters: dict[str, Any]) -> dict[str, Any]:
    """Marks the leaves that Muon orthogonalises: stacked kernels `[layers, in, out]`.

    Embedding, head and norms use Adam, as Muon's author advises.
    """
    return {
        path: jax.tree.map(
            lambda _, path=path: (
                optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
                if re.fullmatch("layers/.*/kernel", path)
                else None
            ),
            adapter,
        )
        for path, adapter in adapters.items()
    }
