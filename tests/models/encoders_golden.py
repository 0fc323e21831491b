"""Tiny `transformers` models with every weight redrawn, and the same weights here."""

import dataclasses
import functools
import math
import re

import flax.traverse_util
import jax
import numpy as np

import lorax
from lorax import tree
from lorax.models import table

TOLERANCE = 1e-4  # times the standard deviation of the logits
MUTATION = 100 * TOLERANCE  # how much a switch must change


def redraw(model, gains=(), shifts=(), seed=0):
    """Redraws every tensor: none is left at 0 or 1, where an error would hide.

    Args:
      model: a `transformers` model, changed in place.
      gains: `{regex in a name: factor on the draw}`.
      shifts: `{regex in a name: mean of the draw}`.
      seed: seed of the draw.
    """
    rng = np.random.default_rng(seed)
    for name, tensor in model.named_parameters():
        draw = rng.standard_normal(tuple(tensor.shape))
        if "norm" in name.lower() and name.endswith("weight"):
            draw = 1 + 0.4 * draw
        elif tensor.ndim == 1:
            draw = 0.5 * draw
        elif not any(part in name for part in ("embed", "shared", "_bias")):
            draw = 1.5 * draw / np.sqrt(tensor.shape[1])
        draw *= math.prod(
            gain for part, gain in dict(gains).items() if re.search(part, name)
        )
        draw += sum(
            shift for part, shift in dict(shifts).items() if re.search(part, name)
        )
        tensor.detach().numpy()[...] = draw  # they share memory
    return model.eval()


def load(tensors, module, config, *example):
    """Returns our parameters from a state dict, using the family's table.

    Every leaf must be filled, and every name left over must be one the family ignores.
    """
    init = functools.partial(module.Model(config).init, jax.random.key(0))
    leaves = tree.flatten(jax.eval_shape(init, *example))
    tables = [of(config) for of in (module.entries, *getattr(module, "FURTHER", ()))]
    places = table.nearest(tables, config.stacks, config.scan, tensors)
    found = {}
    for key, place in places.items():
        tensor, shape = tensors[key].numpy(), leaves[place.path].shape
        whole = found.setdefault(place.path, np.full(shape, np.nan, np.float32))
        whole[place.part] = table.from_disk(tensor, place.own(shape), place.entry)
    assert found.keys() == leaves.keys()
    assert all(np.isfinite(leaf).all() for leaf in found.values())
    read = {tensors[key].data_ptr() for key in places}
    left = [
        key
        for key in tensors.keys() - places.keys()
        if tensors[key].data_ptr() not in read  # tied to one that was read
        and not any(re.fullmatch(pattern, key) for pattern in module.IGNORED)
    ]
    assert not left, f"neither read nor ignored: {left}"
    return {"params": flax.traverse_util.unflatten_dict(found, sep="/")}


@functools.cache
def _programs(model, method):
    """Compiled programs by argument shapes; tests share them."""
    return jax.jit(functools.partial(model.apply, method=method)), {}


def run(module, config, variables, *args, method=None, **kwargs):
    """Applies the family's model, without compiler optimisation."""
    apply, compiled = _programs(module.Model(config), method)
    abstract = jax.tree.map(jax.typeof, (variables, args, kwargs))
    key = str(abstract)
    if key not in compiled:
        compiled[key] = apply.lower(variables, *args, **kwargs).compile(
            {"xla_backend_optimization_level": 0}
        )
    return compiled[key](variables, *args, **kwargs)


def call(function, *args, **kwargs):
    """Jits and calls once, without compiler optimisation."""
    lowered = jax.jit(function).lower(*args, **kwargs)
    return lowered.compile({"xla_backend_optimization_level": 0})(*args, **kwargs)


def error(got, want, where=None):
    """Largest difference over the standard deviation of `want`, which is at least 1."""
    got, want = np.asarray(got), np.asarray(want)
    if where is not None:
        got, want = got[where], want[where]
    assert want.std() >= 1, f"std {want.std():.2f}: such logits hide errors"
    return np.abs(got - want).max() / want.std()


def unscanned(config, variables):
    """The same model with its layers unstacked."""
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    apart = {}
    for path, leaf in flat.items():
        before, stacked, after = path.rpartition("layers/")
        if not stacked:
            apart[path] = leaf
            continue
        for layer, part in enumerate(leaf):
            apart[f"{before}layers_{layer}/{after}"] = part
    return (
        dataclasses.replace(config, scan=False),
        flax.traverse_util.unflatten_dict(apart, sep="/"),
    )


def drawn(module, config, *example):
    """Random parameters for tests of our model alone; no weight is small."""
    rng = np.random.default_rng(0)
    init = functools.partial(module.Model(config).init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: rng.normal(0.0, 0.4, leaf.shape).astype(leaf.dtype),
        jax.eval_shape(init, *example),
    )


def gradients(loss, params, targets):
    """Gradients of adapters made by `targets`: all finite, and none all zero."""
    kernels = lorax.discover(loss, params)
    init = lambda params: lorax.init(jax.random.key(0), params, targets, kernels)
    adapters, params = call(init, params)
    adapted = lorax.adapt(loss, on_merge="error")
    grads = jax.device_get(call(jax.grad(adapted), adapters, params))
    for path, grad in grads.items():
        leaves = jax.tree.leaves(grad)
        assert all(np.isfinite(leaf).all() for leaf in leaves), path
        assert max(np.abs(leaf).max() for leaf in leaves) > 0, path
    return grads
