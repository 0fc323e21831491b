"""LoftQ: adapters initialised to what quantising the base loses.

    Q_t = q(W - s A_{t-1} B_{t-1}),    s A_t B_t = best rank-r part of W - Q_t

Started from the standard init, A_0 B_0 = 0, this is LoftQ. Started from PiSSA, where
A_0 B_0 is the principal part of W, it is QPiSSA, which quantises a narrower residual.

References:
  Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models,
  arXiv:2310.08659, algorithm 1.
  Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
  Language Models, arXiv:2404.02948 (QPiSSA with T iterations).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lorax import _checks, linalg, quantization, quantized, transform, tree
from lorax.adapters import pairs
from lorax.kernels import Kernel
from lorax.quantization import Rules
from lorax.quantized import Format, Quantized
from lorax.types import Adapters, Axes, PyTree


def loftq(
    adapters: Adapters,
    params: PyTree,
    rules: Rules = "nf4",
    kernels: Mapping[str, Kernel] | None = None,
    *,
    steps: int = 5,
) -> tuple[Adapters, PyTree]:
    """Quantises a base and fits the adapters to the quantisation error.

    Each step quantises what the adapter does not hold, then fits the adapter to what
    the codes lack. The fit never raises the error in the Frobenius norm. Afterwards
    `merge(adapters, params)` is close to the given kernels, not equal to them.

    The published QPiSSA stops one fit earlier, at the codes; `lorax.quantize` of what
    init="pissa" returns is its first iteration.

    Args:
      adapters: from `lorax.init`; those on leaves to be quantised must be Lora or
        AdaLora. Their rank, scale and layers stay the same.
      params: the dense parameters that came with them.
      rules: as for `lorax.quantize`. A leaf that matches a rule but has no adapter is
        simply quantised; an adapter on a leaf that stays dense is left unchanged.
      kernels: from `discover`, as for `lorax.quantize`.
      steps: T in the papers: 5 in the experiments of both LoftQ and QPiSSA. Each step
        takes a full decomposition of every kernel.

    Returns:
      Adapters and parameters that replace those from `lorax.init`.

    Raises:
      ValueError: as for `quantize`; steps below 1; no adapter on any leaf that the
        rules match, or one whose update is not a product of two trained factors.

    Example:
      >>> import jax, jax.numpy as jnp, lorax
      >>> dense = {"w": jax.random.normal(jax.random.key(0), (256, 64))}
      >>> adapters, params = lorax.init(jax.random.key(1), dense, [("w", 8)])
      >>> adapters, params = loftq(adapters, params, [("w", "nf4")])
      >>> error = lambda w: float(jnp.linalg.norm(w - dense["w"]))
      >>> plain = lorax.quantize(dense, [("w", "nf4")])
      >>> merged = lorax.merge(adapters, params)
      >>> round(error(merged["w"]) / error(jnp.asarray(plain["w"])), 2)
      0.76
    """
    if not _checks.is_whole(steps) or steps < 1:
        raise ValueError(
            f"steps={steps!r}; give a whole number >= 1, or quantise without fitting: "
            "lorax.quantize(params, rules, kernels)"
        )
    transform.check(adapters, params)
    chosen = quantization.resolved(params, rules, kernels)
    _require_products(adapters, chosen)
    leaves: dict[str, Quantized] = {}
    for path, (kernel, form) in chosen.items():
        if path in adapters:
            both = _alternated(adapters[path], kernel, form, steps)
            adapters = {**adapters, path: both[0]}
            leaves[path] = both[1]
        else:
            leaves[path] = quantization.packed(kernel, form)
    return adapters, tree.replace(params, leaves)


def _require_products(adapters: Adapters, chosen: Mapping[str, Any]) -> None:
    """Raises ValueError unless there are adapters to fit, all of them products."""
    both = [path for path in adapters if path in chosen]
    if not both:
        raise ValueError(
            f"the rules quantise {[*chosen][:5]} and the adapters are on "
            f"{[*adapters][:5]}: no quantised leaf has an adapter to fit; adapt the "
            "leaves that are quantised, or use lorax.quantize"
        )
    for path in both:
        adapter = adapters[path]
        if not (getattr(adapter, "additive", False) and pairs.has_factors(adapter)):
            raise ValueError(
                f"{path}: the update of {type(adapter).__name__} is not a product of "
                "trained factors that LoftQ could fit to the quantisation error; use "
                "adapter='lora' or 'adalora', or keep the adapter as it is and call "
                "lorax.quantize(params, rules, kernels)"
            )


def _alternated(
    adapter: Any, kernel: Kernel, form: Format, steps: int
) -> tuple[Any, Quantized]:
    """The adapter and the codes after `steps` turns, starting from `adapter`."""
    given = {"form": form.quantize, "axes": kernel.linear_axes(), "steps": steps}
    try:
        fitted, codes = _turns(adapter, kernel.value, **given)
    except ValueError as error:
        raise ValueError(f"{kernel.path}: {error}") from None
    start = f", from={adapter.moved_by}" if adapter.moved_by else ""
    said = f"loftq({form}, steps={steps}, rank={adapter.rank}{start})"
    return fitted.replace(moved_by=said), codes


@functools.partial(jax.jit, static_argnames=("form", "axes", "steps"))
def _turns(
    adapter: Any,
    leaf: jax.Array,
    *,
    form: Callable[[jax.Array, Axes], Quantized],
    axes: Axes,
    steps: int,
) -> tuple[Any, Quantized]:
    dtype, leaf = leaf.dtype, linalg.widened(leaf)
    whole = adapter.merge(leaf)

    def codes_of(adapter: Any) -> Quantized:
        codes = form(whole - adapter.delta(leaf), axes)
        return dataclasses.replace(codes, dtype=dtype)

    def fitted(adapter: Any, codes: Quantized) -> Any:
        base = quantized.dequantize(codes).astype(whole.dtype)
        return pairs.nearest(adapter, whole - base)[0]

    def turn(_: int, both: tuple[Any, Quantized]) -> tuple[Any, Quantized]:
        adapter = fitted(*both)
        return adapter, codes_of(adapter)

    both = jax.lax.fori_loop(1, steps, turn, (adapter, codes_of(adapter)))
    return fitted(*both), both[1]
