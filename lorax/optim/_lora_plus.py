"""LoRA+: a higher learning rate for the second factor.

    lr_b = ratio * lr_a

The first factor reads wide inputs and the second starts at zero; with the same learning
rate for both, the first hardly learns features. With updates of equal size in every
entry (Adam, sign), equal contributions of both factors to the loss require

    ratio = n / sqrt(m r)                        ("auto", clipped to [1, 64])

for a kernel `[n, m]` at rank r: 16 for a square kernel of width 2048 at rank 8. Factors
are identified by their *role*. The released code uses names and treats every
one-dimensional tensor, including DoRA's magnitude, as a second factor; here magnitude,
lam and value keep the base rate. AdaLoRA's q counts as b, as in the released code.

References:
  Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv:2402.12354.
  Su Jianlin, kexue.fm/archives/10001, for the balance of contributions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax import _checks, scaling, tree
from lorax.adapters import layout
from lorax.optim import _decay, _standard, _states, _trees
from lorax.types import Adapters, PairStatics

SECOND = ("b", "q")  # roles of the second factor

Ratio = Any
"""A number, a schedule, "auto", or rules `[(pattern, number or "auto"), ...]`."""


class ScaleByLoraPlusState(NamedTuple):
    """The state if the ratio is a schedule.

    Attributes:
      count: updates so far, int32.
    """

    count: jax.Array  # type: ignore[assignment]


def scale_by_lora_plus(ratio: Ratio = 16.0) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of every second factor by `ratio`.

        u_a <- u_a,    u_b <- ratio * u_b

    Chain it after the moments: before them, Adam would divide the ratio out again.

    Args:
      ratio: a number > 0; a schedule, from the step count to a number; "auto", the
        width rule `clip(n / sqrt(m r), 1, 64)` for each kernel; or rules
        `[(pattern, number or "auto"), ...]`: the first rule whose pattern matches the
        whole path wins. 16 is recommended by the paper's sweep.

    Returns:
      An optax transformation; `update` accepts `pairs=` for a population member.

    Raises:
      ValueError: a ratio that is not positive; at `init`, a pattern that matches no
        path, or a path that no pattern matches.

    Example:
      >>> from lorax.adapters import Lora
      >>> from lorax.types import Axes
      >>> lora = Lora(jnp.ones((4, 1)), jnp.ones((1, 1)), 1.0, Axes((0,), (1,)))
      >>> tx = scale_by_lora_plus("auto")  # 4 / sqrt(1 * 1)
      >>> updates, _ = tx.update({"w": lora}, tx.init({"w": lora}))
      >>> float(updates["w"].a[0, 0]), float(updates["w"].b[0, 0])
      (1.0, 4.0)
    """
    ratio = _check_ratio(ratio)

    def init_fn(params: Adapters) -> optax.OptState:
        given = _trees.require_adapters(params, "scale_by_lora_plus")
        if isinstance(ratio, tuple):
            _check_rules(ratio, [path for path, a in given.items() if _seconds(a)])
        if _reads_shapes(ratio):
            _trees.require_whole(given, "scale_by_lora_plus('auto')")
        if callable(ratio):
            return ScaleByLoraPlusState(count=jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: Adapters,
        state: optax.OptState,
        params: Adapters | None = None,
        *,
        pairs: Mapping[str, PairStatics] | None = None,
        **extra: Any,
    ) -> tuple[Adapters, optax.OptState]:
        del params, extra
        now = ratio
        if callable(ratio):
            now = ratio(state.count)
            state = ScaleByLoraPlusState(optax.safe_increment(state.count))

        def scaled(path: str, adapter: Any) -> Any:
            return _scaled(adapter, _ratio_at(now, path, adapter, pairs))

        return _trees.map_present(scaled, updates), state

    return _states.transformation(init_fn, update_fn)


def lora_plus(
    learning_rate: _checks.NumberOrSchedule,
    ratio: Ratio = 16.0,
    b1: _checks.Number = 0.9,
    b2: _checks.Number = 0.999,
    eps: _checks.Number = 1e-8,
    weight_decay: _checks.NumberOrSchedule = 0.0,
    full_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with a `ratio` times higher learning rate for every second factor.

    At ratio 1 it is bitwise equal to `optax.adamw` with `mask=decay_mask`. Decay acts
    at the base rate on both factors. For another inner optimiser, chain the parts:
    `optax.chain(optax.scale_by_lion(), scale_by_lora_plus(16.0),
    optax.scale_by_learning_rate(1e-4))`.

    Args:
      learning_rate: the rate for everything but second factors; a number or a
        schedule. The authors advise half the rate of plain LoRA.
      ratio: see `scale_by_lora_plus`.
      b1: decay rate of the first moment; Adam's default, as in the released code.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment. LoRA's first gradients are small, so
        keep it at 1e-8 or below.
      weight_decay: see `add_decayed_weights`; 0 as in PEFT.
      full_decay: True makes Full leaves decay to their initial values.

    Returns:
      An optax transformation.

    Raises:
      ValueError: a hyperparameter out of range.

    Example:
      >>> tx = lora_plus(2e-4, ratio=[("attn/.*", 16.0), (".*", "auto")])
    """
    return optax.chain(
        _standard.adam(b1, b2, eps),
        scale_by_lora_plus(ratio),
        _decay.add_decayed_weights(weight_decay, full_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def width_ratio(adapter: Any, rank: Any = None) -> jax.Array | float:
    """Returns the ratio `clip(n / sqrt(m r), 1, 64)` for an adapter's kernel.

    Args:
      adapter: a Lora, Dora or AdaLora; only shapes are read.
      rank: the true rank if a population pads it; None for the adapter's own.
    """
    first, second = (
        next(
            getattr(adapter, field)
            for field, role in adapter.roles.items()
            if role in c
        )
        for c in (("a", "p"), SECOND)
    )
    batch = layout.stack_axes(first, adapter.axes)
    n, m = math.prod(first.shape[batch:-1]), math.prod(second.shape[batch + 1 :])
    if rank is None:
        return scaling.lora_plus_ratio(n, m, adapter.rank)
    ratio = n / jnp.sqrt(m * jnp.asarray(rank, jnp.float32))
    return jnp.clip(ratio, *scaling.LORA_PLUS_RANGE)


def _seconds(adapter: Any) -> list[str]:
    """The fields that hold a second factor; none if the adapter is masked out."""
    if not _trees.is_present(adapter):
        return []
    return [field for field, role in adapter.roles.items() if role in SECOND]


def _scaled(adapter: Any, ratio: Any) -> Any:
    def scaled(u: jax.Array) -> jax.Array:
        return (u * ratio).astype(u.dtype)

    fields = {f: getattr(adapter, f) for f in _seconds(adapter)}
    return adapter.replace(**jax.tree.map(scaled, fields))


def _ratio_at(
    ratio: Ratio, path: str, adapter: Any, pairs: Mapping[str, PairStatics] | None
) -> Any:
    """The ratio for one path, from a number, "auto" or rules."""
    if not _seconds(adapter):
        return 1.0
    if isinstance(ratio, tuple):
        ratio = next(value for pattern, value in ratio if tree.match(pattern, path))
    if isinstance(ratio, str):
        own = None if pairs is None else pairs.get(path)
        return width_ratio(adapter, None if own is None else own.rank)
    return ratio


def _reads_shapes(ratio: Ratio) -> bool:
    """True for "auto", including in a rule."""
    values = [value for _, value in ratio] if isinstance(ratio, tuple) else [ratio]
    return any(isinstance(value, str) for value in values)


def _check_ratio(ratio: Ratio) -> Ratio:
    """Returns the ratio, with rules as a tuple of pairs; ValueError if invalid."""
    if isinstance(ratio, str):
        if ratio != "auto":
            raise ValueError(f"ratio={ratio!r}; give a number, a schedule or 'auto'")
    elif isinstance(ratio, Sequence):
        for rule in ratio:
            if not isinstance(rule, Sequence) or len(rule) != 2 or callable(rule[1]):
                raise ValueError(
                    f"ratio rule {rule!r}; give pairs (pattern, number or 'auto')"
                )
        return tuple((pattern, _check_ratio(value)) for pattern, value in ratio)
    else:
        _checks.positive("ratio", ratio, schedule=True)
    return ratio


def _check_rules(rules: tuple[tuple[str, Any], ...], paths: list[str]) -> None:
    for pattern, _ in rules:
        if not any(tree.match(pattern, path) for path in paths):
            raise ValueError(
                f"ratio: {pattern!r} does not match any whole path; "
                f"{tree.nearest(pattern, paths)}"
            )
    for path in paths:
        if not any(tree.match(pattern, path) for pattern, _ in rules):
            raise ValueError(
                f"ratio: no rule matches {path!r}; end the rules with one for the "
                "rest, such as ('.*', 16.0)"
            )
