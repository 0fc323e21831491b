"""Which leaves are adapted: targets resolved on a parameter tree.

A list of targets is a rule table: each pattern is a regular expression that must match
the whole path, and the first matching target wins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from lorax import adapters, tree, untrusted
from lorax.kernels import Kernel
from lorax.targets import ALL_LINEAR, Rule, Target
from lorax.types import Axes, PyTree


def select(
    params: PyTree,
    targets: Rule | Iterable[Rule],
    kernels: Mapping[str, Kernel] | None = None,
) -> dict[str, tuple[Target, Kernel]]:
    """Resolves targets to leaves.

    Args:
      params: the parameter tree.
      targets: `Target`s, or tuples `(regex, rank, ...)` of their fields in order.
      kernels: from `discover`; without it only two-dimensional leaves, taken as
        `[in, out]`, can get low-rank factors.

    Returns:
      `{path: (target, kernel)}`; each kernel holds its leaf as `value`.

    Raises:
      ValueError: a pattern that matches nothing, or a leaf that cannot be adapted.
      KeyError: kernels that were discovered on another tree.
    """
    leaves = tree.flatten(params)
    if kernels is not None:
        own = {p: k for p, k in kernels.items() if k.stored or not k.leaves}
        tree.require(own, leaves, "parameter tree given to init")
        named = {p: k for p, k in kernels.items() if p not in own}
        for kernel in named.values():
            tree.require(kernel.leaves, leaves, "parameter tree given to init")
        leaves = {**leaves, **named}
    chosen: dict[str, tuple[Target, Kernel]] = {}
    theirs = own_low_rank(params)
    for target in as_targets(targets):
        out = {path: why_not(target, path, kernels, theirs) for path in leaves}
        paths = [path for path, reason in out.items() if reason is None]
        if not paths:
            _refuse_qarrays(target, leaves)
            raise ValueError(
                f"the target {target.pattern!r} matches no leaf"
                + (" outside its exclude" if target.exclude else "")
                + f"; {_nearest(target, leaves, out)}"
            )
        for path in paths:
            if path not in chosen:
                chosen[path] = target, _kernel(target, path, leaves, kernels)
    return dict(sorted(chosen.items()))


def as_targets(targets: Rule | Iterable[Rule]) -> list[Target]:
    """Returns a list of `Target` from one rule or several."""
    if isinstance(targets, Mapping):
        raise TypeError(
            "targets is a dict; give a list of lorax.Target, or of tuples of its "
            "fields such as (regex, rank); the first match wins"
        )
    given: list[Any] = [targets] if isinstance(targets, Target | str) else [*targets]
    if isinstance(targets, tuple):
        if not all(isinstance(rule, Target | tuple | str) for rule in targets):
            given = [targets]  # one rule, such as (regex, rank)
    rules = []
    for rule in given:
        if isinstance(rule, Target):
            rules.append(rule)
        elif isinstance(rule, str):
            rules.append(Target(rule))
        elif isinstance(rule, tuple):
            rules.append(Target(*rule))
        else:
            raise TypeError(
                f"a target is a lorax.Target or a tuple of its fields, not {rule!r}"
            )
    if not rules:
        raise ValueError("no targets; give at least one: lorax.Target('all-linear')")
    return rules


def _nearest(
    target: Target, leaves: Mapping[str, Any], out: Mapping[str, str | None]
) -> str:
    """The paths closest to a pattern, or why "all-linear" leaves the matrices out."""
    if target.pattern != ALL_LINEAR:
        return tree.nearest(target.pattern, leaves)
    matrices = [p for p in leaves if sum(n > 1 for n in leaves[p].shape) > 1]
    said = [f"{path}: {out[path]}" for path in matrices[:8]]
    return "; ".join(said) or "it has no matrices"


def _refuse_qarrays(target: Target, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError if a target matches a QArray of qwix, or its codes."""
    for path in leaves:
        held = path.removesuffix("/qvalue")
        named = tree.match(target.pattern, held) or tree.match(target.pattern, path)
        if held != path and f"{held}/scale" in leaves and named:
            raise ValueError(
                f"{held}: a QArray of qwix, whose arrays are separate leaves; "
                "lorax.interop.qwix.from_qarrays(params, kernels) turns them into one "
                "quantised leaf"
            )


def why_not(
    target: Target,
    path: str,
    kernels: Mapping[str, Kernel] | None,
    theirs: Collection[str] = (),
) -> str | None:
    """Returns why a target leaves a leaf out, in words; None if it does not.

    Args:
      target: the rule.
      path: the leaf's path.
      kernels: from `discover`; "all-linear" needs it.
      theirs: from `own_low_rank`.
    """
    if excludes(target, path):
        return "excluded by its target"
    if target.pattern != ALL_LINEAR:
        matches = tree.match(target.pattern, path)
        return None if matches else f"{target.pattern!r} does not match"
    if kernels is None:
        raise ValueError(
            "the target 'all-linear' needs to know how the program uses each leaf: "
            "pass kernels=lorax.discover(loss_fn, params, batch) to lorax.init"
        )
    if path not in kernels:
        return "not a floating leaf"
    if path in theirs:
        return "a low-rank factor of the model's own"
    kernel = kernels[path]
    if kernel.refused:
        return kernel.refused
    known = (p for p in kernel.leaves if p != path and p in kernels)
    if adapted := [p for p in known if kernels[p].axes is not None]:
        return f"made from {', '.join(adapted)}, and the same operation reads both"
    return _not_linear(kernel)


def excludes(target: Target, path: str) -> bool:
    """True if one of the target's exclude patterns matches the path."""
    return any(tree.match(pattern, path) for pattern in target.excluded)


PASS = (
    "; if the program decodes a kernel from it, pass kernels=lorax.discover(loss_fn, "
    "params, batch)"
)
NOT_MADE = (
    "; no product reads a kernel computed from it and other parameters alone (a loop's "
    "counter is not a parameter: scan over the stack instead; shard_map and functions "
    "with a custom derivative rule are not followed)"
)
ADDED = ("add", "sub", "add_any")  # how a bias or a table of positions is used
LINEAR = ("dot", "conv", "grouped_conv", "ragged_dot")


def _not_linear(kernel: Kernel) -> str | None:
    """Why "all-linear" leaves a floating leaf out, judging by its uses."""
    if kernel.op == "unused":
        return "the program does not use it"
    if kernel.op == "decoding":
        return "part of a kernel that the program computes, such as a scale or a table"
    if kernel.op == "other":
        use = kernel.uses[0]
        if {use.op for use in kernel.uses} <= {*ADDED}:
            return f"{use.op!r} at {use.source}: a bias, or a table that is added"
        return f"{use.op!r} at {use.source} is not linear in it, or not followed"
    if kernel.op == "gather":
        return "an embedding: its rows are looked up"
    if kernel.op == "depthwise_conv":
        return "a depthwise convolution: each output reads one channel"
    if kernel.op not in LINEAR:
        return f"used by {kernel.op!r}"
    if kernel.tied:
        return "tied: one use reads what another writes"
    return "an output head" if kernel.head else None


def own_low_rank(params: PyTree) -> frozenset[str]:
    """Returns the leaves that are factors of the model's own low-rank layers.

    Recognised by their type, `nnx.LoRAParam`, or by the names `lora_a` and `lora_b`.
    """
    plain, _ = tree.split(params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        plain, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    named = {tree.path_name(keys): leaf for keys, leaf in leaves}
    return frozenset(
        path
        for path, leaf in named.items()
        if isinstance(leaf, nnx.LoRAParam)
        or path.rpartition("/")[2].lower() in ("lora_a", "lora_b")
    )


def _kernel(
    target: Target,
    path: str,
    leaves: Mapping[str, Any],
    kernels: Mapping[str, Kernel] | None,
) -> Kernel:
    """Returns the description of one matched leaf, or says why it cannot be adapted."""
    leaf = leaves[path]
    known = None if kernels is None else kernels.get(path)
    if known is not None and known.refused:
        raise ValueError(f"{path}: {known.refused}")
    if kernels is not None and known is not None and known.leaves:
        return _computed(target, known, leaves, kernels)
    if not tree.is_floating(leaf):
        _refuse_qarrays(target, leaves)
        raise ValueError(
            f"{path}: matched by {target.pattern!r}, but its dtype is "
            f"{getattr(leaf, 'dtype', type(leaf).__name__)}, and only floating leaves "
            "can be adapted; narrow the pattern or add it to exclude="
            + ("" if not tree.is_coded(leaf) else PASS if kernels is None else NOT_MADE)
        )
    tree.require_adaptable(path, leaf)
    if tree.is_quantized(leaf) and adapters.get(target.adapter).replaces:
        raise ValueError(
            f"{path}: the leaf is quantised, and adapter={target.adapter!r} trains the "
            "leaf itself; keep it dense with a rule (pattern, None) of lorax.quantize, "
            "or use an adapter that adds to it"
        )
    shape = tuple(leaf.shape)
    if kernels is not None:
        tree.require([path], kernels, "program given to discover")
        found = kernels[path]
        if found.shape != shape:
            raise ValueError(
                f"{path}: the leaf has shape {shape}, but discover saw {found.shape}; "
                "run discover on these parameters"
            )
    elif len(shape) == 2 + len(target.batch_axes or ()):
        batch = _batch_axes(target, path, shape)
        in_, out = (axis for axis in range(len(shape)) if axis not in batch)
        found = Kernel(path, shape, leaf.dtype, "dot", Axes((in_,), (out,), batch))
    else:
        found = Kernel(path, shape, leaf.dtype, "unknown", None)
    if not adapters.get(target.adapter).replaces:
        if found.axes is not None and target.batch_axes:
            axes = _stacked(target, found)
            found = dataclasses.replace(found, axes=axes)
        _check_low_rank(target, found, leaves, kernels)
    return dataclasses.replace(found, value=leaf)


def _computed(
    target: Target,
    kernel: Kernel,
    leaves: Mapping[str, Any],
    kernels: Mapping[str, Kernel],
) -> Kernel:
    """Returns the description of a kernel that the program computes, or refuses."""
    path, leaf = kernel.path, leaves[kernel.path]
    stored = kernel.stored
    if stored is not None and (stored.shape, stored.dtype) != (leaf.shape, leaf.dtype):
        raise ValueError(
            f"{path}: the leaf is {leaf.dtype}{list(leaf.shape)}, but discover saw "
            f"{stored.dtype}{list(stored.shape)}; run discover on these parameters"
        )
    cls = adapters.get(target.adapter)
    if cls.replaces or cls.reads_kernel:
        raise ValueError(
            f"{path}: adapter={target.adapter!r} needs the kernel itself, which the "
            f"program computes from {', '.join(kernel.leaves)} when it runs; use "
            "adapter='lora' or another whose update does not depend on the kernel"
        )
    if target.batch_axes:
        kernel = dataclasses.replace(kernel, axes=_stacked(target, kernel))
    _check_low_rank(target, kernel, leaves, kernels)
    kind = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    return dataclasses.replace(kernel, value=kind)


def _batch_axes(target: Target, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The target's batch axes, counted from the front of a leaf of this shape."""
    given, ndim = target.batch_axes or (), len(shape)
    axes = sorted({axis % ndim for axis in given if -ndim <= axis < ndim})
    if len(axes) < len(given):
        raise ValueError(
            f"{path}: batch_axes={given} for a leaf of shape {shape}; give distinct "
            f"axes from {-ndim} to {ndim - 1}"
        )
    return tuple(axes)


def _stacked(target: Target, kernel: Kernel) -> Axes:
    """The axes that discover found, with the target's batch axes as batch."""
    batch = _batch_axes(target, kernel.path, kernel.shape)
    read = kernel.linear_axes()
    in_, out = (tuple(a for a in group if a not in batch) for group in read[:2])
    moved = {*batch} - {*read.batch}
    if moved and kernel.op != "dot":
        raise ValueError(
            f"{kernel.path}: batch_axes={target.batch_axes}, but {kernel.op!r} reads "
            f"the leaf of shape {kernel.shape} as {read}, and only the axes of a dot "
            "can be reassigned; leave batch_axes out"
        )
    if not in_ or not out:
        raise ValueError(
            f"{kernel.path}: batch_axes={target.batch_axes} leaves the leaf of shape "
            f"{kernel.shape}, read as {read}, with no axis to "
            f"{'read' if not in_ else 'write'}; name only the axes that number kernels"
        )
    return Axes(in_, out, tuple(sorted({*batch, *read.batch})))


def _check_low_rank(
    target: Target,
    kernel: Kernel,
    leaves: Mapping[str, Any],
    kernels: Mapping[str, Kernel] | None,
) -> None:
    path, shape = kernel.path, kernel.shape
    if kernel.axes is None and kernels is None:
        raise ValueError(
            f"{path}: its shape {shape} does not say which axes are read and which "
            "are written; pass kernels=lorax.discover(loss_fn, params, batch)"
        )
    if kernel.axes is None and kernels is not None:
        linear = [p for p in leaves if p in kernels and kernels[p].axes is not None]
        raise ValueError(
            f"{path}: matched by {target.pattern!r}, but no linear operation uses it "
            f"(op={kernel.op!r}), so low-rank factors do not apply; use "
            "adapter='full' or narrow the pattern; "
            + (tree.nearest(path, linear) if linear else "no leaf is used linearly")
        )
    axes = kernel.linear_axes()
    in_, out, _ = (math.prod(size) for size in axes.sizes(shape))
    most = adapters.get(target.adapter).largest_rank(in_, out)
    if most is not None and target.rank > most:
        raise ValueError(
            f"{path}: rank={target.rank} is above min(in, out) = {most} of "
            f"the kernel of shape {shape}; lower the rank or exclude the leaf"
        )
    if target.rows is not None:
        _check_rows(target, kernel, axes)
    if target.slices is not None:
        size = shape[axes.out[0]]
        if len(axes.out) < 2 or target.slices[-1] >= size:
            raise ValueError(
                f"{path}: slices={target.slices}, but in shape {shape} the first out "
                f"axis has size {size}, of {len(axes.out)} out axes; slices number "
                "the parts of a fused kernel [*in, parts, *out]"
            )
        if target.rank > out // size:
            raise ValueError(
                f"{path}: rank={target.rank} is above the {out // size} outputs "
                "of a slice; lower the rank"
            )
    if target.layers is not None:
        depth = shape[axes.batch[0]] if axes.batch else None
        if depth is None or target.layers[-1] >= depth:
            raise ValueError(
                f"{path}: layers={target.layers}, but the leaf of shape {shape} "
                + (f"stacks {depth} layers" if depth else "is not a stack of layers")
            )


def _check_rows(target: Target, kernel: Kernel, axes: Axes) -> None:
    """Checks a target's rows against the embedding or the head that it matched."""
    path, lookup = kernel.path, kernel.op == "gather"
    vocabulary = axes.in_ if lookup else axes.out
    if not (lookup or kernel.head) or len(vocabulary) != 1 or axes.batch:
        how = f"by {kernel.op!r}" if kernel.uses else "in an unknown way"
        raise ValueError(
            f"{path}: rows={untrusted.shown(target.rows)} must belong to an embedding "
            "that is looked up, or to an output head, but this leaf of shape "
            f"{kernel.shape} is used {how}; narrow the pattern, and pass "
            "kernels=lorax.discover(loss_fn, params, batch) to lorax.init"
        )
    size = kernel.shape[vocabulary[0]]
    assert target.rows is not None
    if target.rows[-1] >= size:
        raise ValueError(
            f"{path}: rows={untrusted.shown(target.rows)}, but the vocabulary has "
            f"{size}, 0 to {size - 1}; for more, see lorax.interop.hf.resize_embeddings"
        )
