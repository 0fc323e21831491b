"""Quantises the kernels of a parameter tree, by rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from lorax import quantized, tree
from lorax.kernels import Kernel
from lorax.quantized import FORMATS, Format
from lorax.selection import select
from lorax.targets import ALL_LINEAR, Target
from lorax.types import PyTree

Rules = str | Format | Sequence[tuple[str, str | Format | None]]


def quantize(
    params: PyTree, rules: Rules = "nf4", kernels: Mapping[str, Kernel] | None = None
) -> PyTree:
    """Quantises the kernels of a frozen base to a few bits per weight.

    Every kernel that matches a rule becomes a `quantized.Quantized` leaf. `lorax.adapt`
    shows the function the dense shape and decodes each kernel where the function reads
    it, so only one kernel at a time is held dense, never the whole tree.

    Args:
      params: the pretrained tree; a `Base` keeps its frozen arrays.
      rules: pairs `(pattern, format)`; the first matching pattern wins. Patterns are
        those of `Target`: regular expressions for whole paths, or "all-linear". A
        format is a name in `quantized.FORMATS`, an instance such as
        `quantized.Int4(group=128)`, or None to leave the leaf as it is. A format alone
        stands for `[("all-linear", format)]`. "nf4" is the format of QLoRA.
      kernels: from `discover`; needed by "all-linear" and for kernels that are not
        two-dimensional.

    Returns:
      A tree with the same paths.

    Raises:
      ValueError: a pattern that matches nothing, an unknown format, groups that do not
        divide a kernel's inputs, or a leaf whose rows are looked up (an embedding, tied
        to the head or not), that is already quantised, or that has NaN or infinite
        values.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jax.random.normal(jax.random.key(0), (256, 64))}
      >>> small = quantize(params, [("w", "nf4")])
      >>> small["w"].shape, round(small["w"].nbytes / small["w"].size, 3)
      ((256, 64), 0.516)

    References:
      Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314.
    """
    chosen = resolved(params, rules, kernels)
    return tree.replace(params, {path: packed(*both) for path, both in chosen.items()})


def resolved(
    params: PyTree, rules: Rules, kernels: Mapping[str, Kernel] | None
) -> dict[str, tuple[Kernel, Format]]:
    """Returns the leaves to quantise, `{path: (kernel, format)}`.

    Raises:
      ValueError: as for `quantize`.
    """
    formats = _formats(rules)
    plain, _ = tree.split(params)
    chosen = select(plain, [Target(pattern, rank=1) for pattern in formats], kernels)
    found = {}
    for path, (target, kernel) in chosen.items():
        packed_already = kernel.leaves and target.pattern == ALL_LINEAR
        if (form := formats[target.pattern]) is not None and not packed_already:
            _require_packable(kernel)
            found[path] = kernel, form
    return found


def _formats(rules: Rules) -> dict[str, Format | None]:
    """The rules as a dict, in their order."""
    if isinstance(rules, str) or hasattr(rules, "quantize"):
        rules = [(ALL_LINEAR, rules)]
    formats: dict[str, Format | None] = {}
    for rule in rules:
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise TypeError(
                f"a rule is a pair (pattern, format) such as ('all-linear', 'nf4'), "
                f"not {rule!r}"
            )
        pattern, form = rule
        if isinstance(form, str) and form not in FORMATS:
            raise ValueError(
                f"{pattern!r}: the format {form!r} is not one of {', '.join(FORMATS)}"
            )
        form = FORMATS[form] if isinstance(form, str) else form
        if form is not None and not hasattr(form, "quantize"):
            raise TypeError(
                f"{pattern!r}: {form!r} is not a format; give a name ("
                f"{', '.join(FORMATS)}), lorax.quantized.NF4(...) or the like, or None"
            )
        formats.setdefault(pattern, form)
    return formats


def _require_packable(kernel: Kernel) -> None:
    """Raises ValueError for a leaf that cannot be quantised, or is not worth it."""
    path, leaf = kernel.path, kernel.value
    assert leaf is not None  # `select` has put it there
    if kernel.leaves:
        raise ValueError(
            f"{path}: the program computes this kernel from "
            f"{', '.join(kernel.leaves)}, so there is no leaf to quantise; narrow the "
            "pattern"
        )
    if quantized.is_quantized(leaf):
        raise ValueError(
            f"{path}: the leaf is already quantised; give quantize() the dense "
            "parameters, or narrow the pattern"
        )
    if "gather" in (kernel.op, *(use.op for use in kernel.uses)):
        raise ValueError(
            f"{path}: its rows are looked up, so the whole table would be decoded at "
            "every call; leave embeddings as they are: put (pattern, None) first, or "
            "narrow the pattern"
        )
    if tree.is_concrete(leaf) and not bool(jnp.isfinite(leaf).all()):
        raise ValueError(
            f"{path}: the leaf holds NaN or infinite values, which have no code; load "
            "it again"
        )


def packed(kernel: Kernel, form: Format) -> quantized.Quantized:
    """Returns the quantised leaf that replaces a kernel that holds its value."""
    assert kernel.value is not None
    try:
        make = jax.jit(form.quantize, static_argnums=1)
        return make(kernel.value, kernel.linear_axes())
    except ValueError as error:
        raise ValueError(f"{kernel.path}: {error}") from None
