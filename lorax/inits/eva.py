"""EVA: a spans the directions in which the kernel's inputs vary most.

    X - mean = U S V^T,    a = V_r,    b = 0

The kernel is unchanged. The authors' code and PEFT decompose the *centred* inputs, as
here; the paper's argument (the largest expected gradient of b) also holds for X itself.
They update the decomposition batch by batch, keeping `rho r` components each time,
until the components of consecutive batches have a cosine of 0.99; `lorax.calibrate`
finds those of all batches together.

With `whiten`, a = V_r / std, so that the entries of x a have unit variance. The
authors' code divides by the square root of the singular value, which does not give unit
variance and depends on the number of tokens.

`redistribute` gives more rank to kernels whose components explain more of their inputs'
variance, before `lorax.init`:

    stats = lorax.calibrate(key, loss_fn, params, targets, batches, kernels)
    targets = redistribute(params, targets, stats, kernels)
    adapters, params = lorax.init(key, params, targets, kernels, stats)

References:
  Paischer et al., Parameter Efficient Fine-tuning via Explained Variance Adaptation,
  arXiv:2410.07170; github.com/ml-jku/EVA.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import adapters
from lorax.adapters import making
from lorax.inits import build
from lorax.kernels import Kernel
from lorax.selection import as_targets, select
from lorax.targets import SCALINGS, Rule, Target
from lorax.types import ActivationStats, PyTree

OPTIONS = {"whiten": False}


def eva(
    key: jax.Array, kernel: Kernel, target: Target, stats: ActivationStats
) -> tuple[Any, Kernel]:
    """Returns an adapter that reads the inputs' components, and the kernel unchanged.

    Args:
      key: not used.
      kernel: the leaf and its axes.
      target: its option `whiten` is False by default, as in the paper's language
        experiments; the authors found that it helps on images.
      stats: this path's statistics from `lorax.calibrate`, for this rank or a larger
        one.

    Raises:
      ValueError: statistics with fewer components than the rank, or of another kernel.
    """
    del key
    in_, out, batch = making.sizes(kernel, target)
    found, rank = stats.u.shape[-1], target.rank
    build.require_shape(kernel, stats.u, (*batch, *in_, max(found, rank)))
    a, s = stats.u[..., :rank], stats.s[..., :rank]
    if making.options(target, OPTIONS)["whiten"]:
        s = jnp.where(s > 0, s, 1)
        a = a / s.reshape(*batch, *(1 for _ in in_), rank)
    b = jnp.zeros((*batch, rank, *out))
    return build.around_factors(kernel, target, a, b), kernel


def redistribute(
    params: PyTree,
    targets: Rule | Iterable[Rule],
    stats: Mapping[str, Any],
    kernels: Mapping[str, Kernel] | None = None,
    rho: float = 2.0,
) -> list[Target]:
    """Returns targets with the same total rank, given to the kernels that explain most.

    Component j of a kernel explains `s_j^2 / variance` of its inputs' variance. The
    components of all kernels are ranked by this value and taken until the total rank is
    spent. A stack of layers or experts has a single rank, so its component counts with
    the mean over the stack, costs one rank per kernel, and is passed over if the rest
    of the budget cannot pay for it. The scale is kept by adjusting alpha.

    Args:
      params: the pretrained tree.
      targets: the targets that `stats` were made with; those with another init are kept
        as they are.
      stats: from `lorax.calibrate`.
      kernels: from `lorax.discover`.
      rho: no rank grows by more than a factor of rho, 2 as in the paper and PEFT; 1
        changes nothing. The statistics have enough components for 2.

    Returns:
      A target for each kernel with `init="eva"`, but none for kernels with rank 0; then
      the other targets unchanged, but excluding those kernels.

    Raises:
      ValueError: a rho below 1, or too large for the components in `stats`.
    """
    if not rho >= 1:
        raise ValueError(f"rho={rho}; give a number >= 1")
    rules = as_targets(targets)
    found = select(params, rules, kernels)
    chosen = {path: both for path, both in found.items() if _is_eva(both[0])}
    used = [target for target, _ in found.values()]
    ranks = _ranks(chosen, stats, rho)
    own = [
        _with_rank(path, target, ranks[path])
        for path, (target, _) in chosen.items()
        if ranks[path]
    ]
    taken = tuple(map(re.escape, chosen))
    others = [
        dataclasses.replace(target, exclude=(*target.excluded, *taken))
        for target in rules
        if target in used and not _is_eva(target)
    ]
    return own + others


def _is_eva(target: Target) -> bool:
    whole = adapters.get(target.adapter).replaces
    return target.init in ("eva", eva) and not whole


def _ranks(
    chosen: Mapping[str, tuple[Target, Kernel]], stats: Mapping[str, Any], rho: float
) -> dict[str, int]:
    """The rank that each kernel gets."""
    budget, offers = 0, []
    for path, (target, kernel) in chosen.items():
        in_, out, batch = making.sizes(kernel, target)
        cost = math.prod(batch)
        budget += target.rank * cost
        most = min(round(rho * target.rank), math.prod(in_), math.prod(out))
        if path not in stats or stats[path].s.shape[-1] < most:
            found = stats[path].s.shape[-1] if path in stats else "no"
            raise ValueError(
                f"{path}: rho={rho} needs {most} components, but stats has {found}; "
                "calibrate with these targets, and give a rho of at most 2"
            )
        s, variance = (np.asarray(x, float) for x in stats[path][1:3])
        explained = s**2 / np.where(variance > 0, variance, 1)[..., None]
        shares = explained.reshape(cost, -1).mean(0)[:most]
        offers += [(-share, path, cost) for share in shares]
    ranks = dict.fromkeys(chosen, 0)
    for _, path, cost in sorted(offers):
        if cost <= budget:
            budget -= cost
            ranks[path] += 1
    return ranks


def _with_rank(path: str, target: Target, rank: int) -> Target:
    """A target for this path alone, with the same scale."""
    unit = SCALINGS[target.scaling](1.0, rank)
    return dataclasses.replace(
        target,
        pattern=re.escape(path),
        exclude=None,
        rank=rank,
        alpha=target.scale / unit,
    )
