"""Conversions of one adapter set: scaled, resized to another rank, as plain Lora."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import _checks, linalg, tree
from lorax.adapters import as_lora, pairs, ranks
from lorax.compose import agreement, forms
from lorax.compose.forms import Combined
from lorax.types import Adapters


def scale(adapters: Adapters, factor: float) -> Adapters:
    """Multiplies every update by a number, exactly, through the static scale.

    Args:
      adapters: `{path: Lora | AdaLora}`.
      factor: a finite number, of either sign.

    Returns:
      The same arrays with `scale * factor`.

    Raises:
      ValueError: the factor is not a finite number, or there are Dora or Full adapters
        or ones whose init changed the base.

    Example:
      >>> import lorax
      >>> lora = lorax.Lora(
      ...     jnp.ones((2, 1)), jnp.ones((1, 2)), 2.0, lorax.Axes((0,), (1,))
      ... )
      >>> scale({"w": lora}, 0.5)["w"].scale
      1.0
    """
    if not _checks.is_finite(factor):
        raise ValueError(
            f"factor={factor!r}; give a finite Python number (the scale is static; for "
            "a traced factor, use compose.combine([adapters], [factor]))"
        )
    agreement.require_products(adapters, "scale")
    agreement.refuse_moved(adapters, "scale")
    if full := [path for path, a in adapters.items() if a.replaces]:
        raise ValueError(
            f"{full} are Full: they hold values, not changes, and a change needs the "
            f"base; compose.combine([adapters], [{factor}], params=params) scales "
            "value - base"
        )

    def times(path: str, adapter: Any) -> Any:
        del path
        return adapter.replace(scale=float(adapter.scale * factor))

    return tree.map_adapters(times, adapters)


def negate(adapters: Adapters) -> Adapters:
    """Reverses the sign of every update, exactly: `scale(adapters, -1)`.

    Args:
      adapters: `{path: Lora | AdaLora}`.

    Returns:
      The same arrays with the opposite scale.

    Raises:
      ValueError: as for `scale`.

    References:
      Ilharco et al., Editing Models with Task Arithmetic, arXiv:2212.04089.
    """
    return scale(adapters, -1.0)


def resize(adapters: Adapters, rank: int) -> Combined:
    """Changes every adapter's rank, optimally, by SVD of the factors.

    A smaller rank keeps the leading part of the update `a @ b` (Eckart-Young), computed
    from rank x rank cores and balanced between a and b; an AdaLora keeps its own form.
    A larger rank pads with zeros, which training does not change.

    Args:
      adapters: `{path: Adapter}`; for a Dora the factors are truncated and the
        magnitude is kept; Full adapters are unchanged.
      rank: from 1 to min(in, out) of every kernel.

    Returns:
      The adapters with their scales and dtypes; and by path the Frobenius norm of what
      was lost relative to that of `a @ b`, measured on the factors as stored (including
      the cast).

    Raises:
      ValueError: the rank does not fit a kernel.

    Example:
      >>> import lorax
      >>> lora = lorax.Lora(
      ...     jnp.eye(3, 2), jnp.diag(jnp.array([4.0, 3])), 1.0, lorax.Axes((0,), (1,))
      ... )
      >>> resized, error = resize({"w": lora}, 1)
      >>> resized["w"].rank, round(float(error["w"]), 6)
      (1, 0.6)
    """
    made, error = {}, {}
    for path, adapter in adapters.items():
        made[path], error[path] = resized(path, adapter, rank)
    return Combined(made, error)


def resized(path: str, adapter: Any, rank: int) -> tuple[Any, jax.Array]:
    """Returns one adapter at another rank, and the relative error of its update."""
    if adapter.replaces:
        return adapter, jnp.zeros(())
    if not pairs.has_factors(adapter):
        raise ValueError(
            f"{path}: resize truncates a product of one input and one output factor, "
            f"and {type(adapter).__name__} is not one; convert it to Lora first "
            "(compose.to_lora), or merge and extract it (compose.extract)"
        )
    agreement.require_rank(path, adapter, rank)
    if rank >= adapter.rank:
        return ranks.padded(adapter, rank), jnp.zeros(())
    a, b = pairs.stacked(as_lora(adapter))
    u, s, vt = _svd(a, b)
    after = pairs.with_triplets(adapter, u[..., :rank], s[..., :rank], vt[:, :rank])
    a_, b_ = pairs.stacked(as_lora(after))
    left = jnp.concatenate([a, a_], -1), jnp.concatenate([b, -b_], -2)
    _, lost, _ = _svd(*left)
    return after, forms.relative(jnp.linalg.norm(lost), jnp.linalg.norm(s))


_svd = jax.jit(linalg.low_rank_svd)  # many paths share a shape: compile it once


def to_lora(adapters: Adapters, initial: Adapters | None = None) -> Adapters:
    """Converts adapters to plain Lora, for the original base if an init changed it.

        W_moved + s a b  =  W + s (a b - a0 b0)  =  W + s [a, a0] @ [b; -b0]

    PiSSA, MiLoRA, LoRA-GA, OLoRA and CorDA start from `W_moved = W - s a0 b0`: on the
    *original* base their adapters are only right if written like this, at twice the
    rank.

    Args:
      adapters: `{path: Adapter}`; an AdaLora becomes `p @ (lam * q)`, a LoHa of rank r
        a Lora of rank r^2, a LoKr a Lora whose rank is the product of its ranks (a full
        matrix counts with its shorter side), a MiSS a Lora of its rank; Full adapters
        are unchanged.
      initial: what `lorax.init` returned, before training, for inits that changed the
        base; None if the base was not changed. Adapters whose update was zero at the
        start (the standard init) keep their rank. (To write an AdaLora as a Lora on the
        changed base, see `lorax.adapters.as_lora`.)

    Returns:
      `{path: Lora | Full}`, with the same scales.

    Raises:
      ValueError: there are Dora adapters; an init changed the base and `initial` is
        missing or lacks a path; or `initial` comes from another model or init.

    References:
      Meng et al., PiSSA, arXiv:2404.02948. Wang et al., LoRA-GA, arXiv:2407.05000.
    """
    agreement.require_products(adapters, "to_lora")
    plain = tree.map_adapters(lambda _, a: as_lora(a), adapters)
    if initial is None:
        agreement.refuse_moved(plain, "to_lora without initial=")
        return plain
    if lacking := sorted(adapters.keys() - initial.keys()):
        raise ValueError(
            f"initial has no adapter for {lacking}; pass the complete dict that "
            "lorax.init returned for these adapters"
        )
    agreement.require_products(
        {path: initial[path] for path in plain}, "to_lora(initial=)"
    )
    return {path: _on_base(path, a, initial[path]) for path, a in plain.items()}


def _on_base(path: str, adapter: Any, initial: Any) -> Any:
    """The adapter minus its initial update."""
    if adapter.replaces:
        return adapter
    start = as_lora(initial)
    both = [("the adapter", adapter), ("initial", start)]
    agreement.require_same(path, both)
    agreement.require_one_base(path, both)
    factors = start.a, start.b
    if any(tree.is_concrete(f) and not np.asarray(f).any() for f in factors):
        return adapter
    shared = forms.shared_scale([adapter, start])
    pair = [forms.rescaled(lora, shared) for lora in (adapter, start)]
    return pair[0].replace(
        a=jnp.concatenate([lora.a for lora in pair], -1),
        b=jnp.concatenate([pair[0].b, -pair[1].b], len(adapter.axes.batch)),
        moved_by=None,
    )
