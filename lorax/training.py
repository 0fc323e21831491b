"""The train step: a pure function of (state, params, batch), ready for `jax.jit`.

Only `TrainState.adapters` trains; no step changes `params`, so one copy serves
training, evaluation, `merge` and every member of a population. A loss follows the
protocol of `lorax.losses`:

    loss_fn(params, model_state, batch, key) -> (loss, (metrics, model_state))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lorax import steps, transform
from lorax.losses import LossFn, Metrics, Reference, checked, simple_loss
from lorax.optim import order
from lorax.steps import Pairs, Part, Work, join
from lorax.types import Adapters, PyTree

__all__ = [
    "LossFn",
    "Metrics",
    "Part",
    "Reference",
    "TrainState",
    "Work",
    "create_state",
    "join",
    "make_eval_step",
    "make_train_step",
    "simple_loss",
    "train_parts",
]


@flax.struct.dataclass
class TrainState:
    """The state carried from one train step to the next.

    Attributes:
      adapters: the trainable leaves.
      opt_state: the optimiser state, for the adapters alone.
      model_state: what the model updates without gradients; `{}` if nothing.
      step: int32 []; batches seen, including skipped ones, so that keys stay in step
        with the data. The optimiser's own count advances on `step - skipped` of them.
      skipped: int32 []; batches whose update was skipped (see `make_train_step`).
      key: step `t` folds `t` into this key; the key itself never changes.
    """

    adapters: Adapters
    opt_state: optax.OptState
    model_state: PyTree
    step: jax.Array
    skipped: jax.Array
    key: jax.Array


def create_state(
    key: jax.Array,
    adapters: Adapters,
    tx: optax.GradientTransformation,
    model_state: PyTree = None,
) -> TrainState:
    """Returns the state before the first step.

    Every array is copied, so donating the state to a jitted step deletes nothing that
    the caller still holds (a `Full` adapter may share its buffer with `params`).

    Args:
      key: a typed key, `jax.random.key(seed)`.
      adapters: from `lorax.init`, or restored from a checkpoint.
      tx: any optax transformation.
      model_state: any pytree of arrays; None for a model without state.

    Returns:
      A TrainState at step 0.

    Raises:
      ValueError: no adapters, an old-style key, or a chain in which a transform of
        gradients, such as `scale_by_lora_pro`, comes after Adam or momentum.
      TypeError: `tx` is not an optax transformation.

    Example:
      >>> import lorax.adapters
      >>> adapters = {"bias": lorax.adapters.Full(jnp.zeros(3))}
      >>> state = create_state(jax.random.key(0), adapters, optax.sgd(0.1))
      >>> int(state.step), state.model_state
      (0, {})
    """
    tx = transformation(tx)
    if not adapters:
        raise ValueError("adapters is empty: there is nothing to train")
    if not jnp.issubdtype(getattr(key, "dtype", int), jax.dtypes.prng_key):
        raise ValueError(f"key must be typed, jax.random.key(seed); got {key!r}")
    opt_state = tx.init(adapters)
    order.require_order(opt_state)
    state = TrainState(
        adapters=adapters,
        opt_state=opt_state,
        model_state={} if model_state is None else model_state,
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        key=key,
    )
    # A weakly typed leaf (a schedule's Python float) would retrace the second step.
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype), state)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    on_merge: Literal["warn", "error"] = "warn",
    reference: Reference | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `step(state, params, batch) -> (state, metrics)`, pure and donatable.

    With microbatch losses `l_i`, each a mean over `w_i` target tokens,

        loss = sum_i w_i l_i / sum_i w_i,    g = sum_i w_i grad(l_i) / sum_i w_i,
        g   <- g * min(1, clip_norm / |g|)

    summed in at least float32, so any `accumulate` gives the same step as the whole
    batch at once. The new state has the structure, shapes and dtypes of the old one:
    jit the step once, as `jax.jit(step, donate_argnums=0)`.

    A step is skipped (it changes only `step` and `skipped`, and keeps adapters,
    optimiser state and model state) if its loss or gradient norm is not finite, if one
    of the three would get a NaN or infinity where it had none (an infinite learning
    rate, Adam without an epsilon, overflow in float16), or if its batch has no target
    tokens. The optimiser's count stays too, so a schedule that reaches inf stops
    training for good.

    Args:
      loss_fn: `(params, model_state, batch, key) -> (loss, (metrics, model_state))`,
        with a scalar loss and a dict of metrics; written for plain `params`, see
        `lorax.adapt`. The key differs by step and microbatch.
      tx: any optax transformation; one that takes extra arguments gets `base=params`,
        `pairs`, and `microbatch`: a `MicrobatchNorms` if `accumulate` is above 1, else
        None.
      accumulate: microbatches per step, run sequentially; must divide the batch's
        leading axis. Microbatch i takes rows i, i + accumulate, ..., so a batch sharded
        over devices stays sharded. `model_state` passes through them in turn.
      clip_norm: bound on the gradients' global norm; None for no clipping.
      on_merge: what `lorax.adapt` does when it must form a merged kernel.
      reference: `(frozen, params, batch) -> outputs` of models that do not train: the
        base's log-probabilities, `lorax.adapt(fn)({}, params, batch)`, or a teacher's
        hidden states. It runs outside `adapt`, without gradients, once per microbatch;
        `loss_fn` gets its result as an argument after the key.

    Returns:
      The step. It takes two more arguments: `pairs={path: PairStatics}` overrides the
      scale and rank of adapters, see `lorax.population`; `frozen` is any tree of arrays
      that the reference reads besides the base, or None. Its metrics are the loss's
      own, averaged with the weights `w_i` (equal if `loss_fn` gives none; "weight"
      itself is their sum), and "loss", "grad_norm" (before clipping) and "skipped" (the
      total so far).

    Raises:
      ValueError: `accumulate` below 1, or `clip_norm` not positive.
      TypeError: `tx` is not an optax transformation, or `loss_fn` is not callable.

    Example:
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
      >>> lora = Lora(jnp.ones((2, 1)), jnp.zeros((1, 1)), 1.0, Axes((0,), (1,)))
      >>> params = {"w": jnp.zeros((2, 1))}
      >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.ones((4, 1))}
      >>> tx = optax.sgd(0.125)
      >>> state = create_state(jax.random.key(0), {"w": lora}, tx)
      >>> step = jax.jit(make_train_step(simple_loss(loss_fn), tx), donate_argnums=0)
      >>> state, metrics = step(state, params, batch)
      >>> float(metrics["loss"]), float(metrics["grad_norm"])
      (1.0, 4.0)
      >>> state.adapters["w"].b
      Array([[0.5]], dtype=float32)
    """
    parts = train_parts(
        loss_fn,
        tx,
        accumulate=accumulate,
        clip_norm=clip_norm,
        on_merge=on_merge,
        reference=reference,
    )
    return steps.join(parts)


def train_parts(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    on_merge: Literal["warn", "error"] = "warn",
    reference: Reference | None = None,
) -> list[Part]:
    """Returns the parts that `make_train_step` joins, for you to change and join.

    Args:
      loss_fn: as for `make_train_step`, like all other arguments.
      tx: any optax transformation.
      accumulate: microbatches per step.
      clip_norm: bound on the gradients' global norm; None for no clipping.
      on_merge: what `lorax.adapt` does when it must form a merged kernel.
      reference: outputs of models that do not train.

    Returns:
      A list of `Part`: "gradients", "check", "clip", "update", "guard".

    Example:
      >>> import lorax.adapters
      >>> def halve(work):
      ...     return work.replace(grads=jax.tree.map(lambda g: g / 2, work.grads))
      >>> loss_fn = simple_loss(lambda params, batch: jnp.sum(params["w"] * batch))
      >>> tx, adapters = optax.sgd(1.0), {"w": lorax.adapters.Full(jnp.asarray(2.0))}
      >>> parts = train_parts(loss_fn, tx)
      >>> parts.insert(3, Part("halve", halve))
      >>> state = create_state(jax.random.key(0), adapters, tx)
      >>> state, _ = join(parts)(state, {"w": jnp.asarray(2.0)}, jnp.asarray(1.0))
      >>> float(state.adapters["w"].value)
      1.5
    """
    tx = transformation(tx)
    if type(accumulate) is not int or accumulate < 1:
        raise ValueError(f"accumulate must be an int of at least 1; got {accumulate!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, or None; got {clip_norm!r}")
    value_and_grad = jax.value_and_grad(
        _adapted(loss_fn, on_merge, reference), has_aux=True
    )

    parts = [
        steps.gradients(value_and_grad, accumulate),
        Part("check", steps.check),
        steps.clip(clip_norm),
        steps.update(tx),
        Part("guard", steps.guard),
    ]
    return parts


def make_eval_step(
    loss_fn: LossFn,
    *,
    on_merge: Literal["warn", "error"] = "warn",
    reference: Reference | None = None,
) -> Callable[..., Metrics]:
    """Returns `step(state, params, batch) -> metrics`: no dropout, nothing updated.

    Args:
      loss_fn: the loss given to `make_train_step`; it gets `key=None`, which tells it
        to evaluate (running statistics, no dropout).
      on_merge: what `lorax.adapt` does when it must form a merged kernel.
      reference: as for `make_train_step`.

    Returns:
      The step, with `pairs` and `frozen` as in the train step; its metrics are the
      loss's own and "loss". To average them over batches, weight them by "weight".

    Raises:
      TypeError: `loss_fn` is not callable.

    Example:
      >>> import lorax.adapters
      >>> adapters = {"w": lorax.adapters.Full(jnp.asarray(2.0))}
      >>> state = create_state(jax.random.key(0), adapters, optax.sgd(0.1))
      >>> step = make_eval_step(simple_loss(lambda params, batch: params["w"] * batch))
      >>> float(step(state, {"w": jnp.asarray(1.0)}, 3.0)["loss"])
      6.0
    """
    adapted = _adapted(loss_fn, on_merge, reference)

    def step(
        state: TrainState,
        params: PyTree,
        batch: PyTree,
        pairs: Pairs = None,
        frozen: PyTree = None,
    ) -> Metrics:
        args = (state.adapters, pairs, frozen, params, state.model_state, batch, None)
        loss, (metrics, _) = adapted(*args)
        return {**metrics, "loss": loss}

    return step


def _adapted(
    loss_fn: LossFn, on_merge: Literal["warn", "error"], reference: Reference | None
) -> Callable[..., Any]:
    """The checked loss of `(adapters, pairs, frozen, params, ...)`."""
    adapted = transform.adapt(checked(loss_fn), on_merge=on_merge)

    def scaled(
        adapters: Any,
        pairs: Pairs,
        frozen: PyTree,
        params: PyTree,
        model_state: PyTree,
        batch: PyTree,
        key: Any,
        **extra: Any,
    ) -> Any:
        # Set here, so that a traced scale is never among the differentiated leaves.
        own = {p: adapters[p].replace(scale=s.scale) for p, s in (pairs or {}).items()}
        said = (reference(frozen, params, batch),) if reference else ()
        args = params, model_state, batch, key, *said
        return adapted({**adapters, **own}, *args, **extra)

    return scaled


def transformation(tx: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with support for extra arguments; TypeError if it is not optax's."""
    if isinstance(tx, optax.MultiSteps):
        # Its own `gradient_transformation()` drops the extra arguments.
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx must be an optax transformation, such as optax.adam(1e-3); got {tx!r}"
        )
    return optax.with_extra_args_support(tx)
