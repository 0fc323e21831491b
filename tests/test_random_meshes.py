"""The random programs on a mesh: Auto, Explicit or Manual, by `shard_map` over either.

Each leaf is sharded along up to two of its axes. Under Explicit axes it is gathered
where it is used, as in FSDP, and both operands of its product are resharded as drawn;
under Manual axes the shards are gathered inside.
"""

import math
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import lorax
from tests import programs
from tests import test_random_programs as random

KINDS = ("auto", "explicit", "manual", "manual of explicit")


def mesh_of(kind):
    axis = AxisType.Explicit if "explicit" in kind else AxisType.Auto
    devices = jax.devices()[:4]
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis,) * 2, devices=devices)


def spec_of(shape, i, j):
    """Shards up to two even dimensions over the axes of the mesh."""
    found = [None] * len(shape)
    for axis, draw in (("x", i), ("y", j)):
        free = [d for d, n in enumerate(shape) if n % 2 == 0 and found[d] is None]
        if free and draw % 4:
            found[free[draw % len(free)]] = axis
    return P(*found)


def explicitly(i, j):
    """A product whose operands are resharded and whose result is replicated."""

    def dot(x, y, numbers):
        x = reshard(x, spec_of(x.shape, j, i))
        y = reshard(y, spec_of(y.shape, i + 1, j))
        return jax.lax.dot_general(x, y, numbers, out_sharding=P())

    return dot


def on_mesh(kind, leaves, instructions, specs, i, j):
    """The program of the instructions, written for this kind of mesh."""
    if kind == "explicit":
        fn = random.program(leaves, instructions, dot=explicitly(i, j))
        whole = lambda params: {path: reshard(w, P()) for path, w in params.items()}
        return lambda params, x: fn(whole(params), x)
    fn = random.program(leaves, instructions)
    if kind == "auto":
        place = lambda w: jax.lax.with_sharding_constraint(w, spec_of(w.shape, j, i))
        return lambda params, x: fn(jax.tree.map(place, params), x)

    def gathered(w, spec):
        for dim, axis in enumerate(spec):
            if axis is not None:
                w = jax.lax.all_gather(w, axis, axis=dim, tiled=True)
        return w

    def shard(params, x):
        whole = {path: gathered(w, specs[path]) for path, w in params.items()}
        x = jax.lax.pcast(x, ("x", "y"), to="varying")
        return jax.lax.pmean(fn(whole, x), ("x", "y"))

    return jax.shard_map(shard, in_specs=(specs, P()), out_specs=P())


def check(kind, leaves, instructions, i, j):
    # jax 0.10 cannot map any product with an out_sharding
    mapped = {
        random.WRAPPERS[wrap % len(random.WRAPPERS)] for _, wrap, *_ in instructions
    }
    assume(kind != "explicit" or random.mapped not in mapped)
    mesh = mesh_of(kind)
    with jax.enable_x64(True), jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("error", lorax.MergeWarning)
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        shapes = [tuple(size for _, size in dims) for dims in leaves]
        specs = {f"w{n}": spec_of(s, i + n, j + n) for n, s in enumerate(shapes)}
        fn = on_mesh(kind, leaves, instructions, specs, i, j)
        draw = np.random.RandomState(3).randn
        host = {f"w{n}": draw(*s) for n, s in enumerate(shapes)}
        params = {path: put(leaf, specs[path]) for path, leaf in host.items()}
        x = put(draw(random.T, random.WIDTH), P())
        made = {f"w{n}": random.adapter_of(d, 1 + n, n) for n, d in enumerate(leaves)}
        kernels = lorax.discover(fn, params, x)
        adapted = lorax.adapt(fn, custom_rules="branch")
        plain = random.program(leaves, instructions)
        alone = lorax.discover(plain, host, np.asarray(x))
        for path, kernel in kernels.items():  # what a mesh does not change
            assert kernel.op == alone[path].op
            fast = [use.fast for use in kernel.uses]
            assert all(fast) == all(use.fast for use in alone[path].uses)
            if not all(fast):
                warnings.simplefilter("ignore", lorax.MergeWarning)
        step = jax.jit(jax.value_and_grad(adapted)).lower(made, params, x)
        fast = {"xla_backend_optimization_level": 0}
        got = step.compile(fast)(made, params, x)
    with jax.enable_x64(True):  # the same program on one device, by its definition
        alone = jax.jit(jax.value_and_grad(programs.definition(plain)))
        params = {path: jnp.asarray(leaf) for path, leaf in host.items()}
        step = alone.lower(made, params, jnp.asarray(np.asarray(x)))
        want = step.compile(fast)(made, params, jnp.asarray(np.asarray(x)))
    got, want = jax.tree.map(np.asarray, (got, want))
    norm = math.sqrt(sum(float(np.sum(w**2)) for w in jax.tree.leaves(want)))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-9 * norm)


drawn = (
    st.sampled_from(KINDS),
    random.some_leaves,
    random.some_uses,
    random.small,
    random.small,
)
test_programs_on_meshes = settings(max_examples=12, **random.SETTINGS)(
    given(*drawn)(check)
)
test_many_more_programs_on_meshes = pytest.mark.slow(
    settings(max_examples=500, **random.SETTINGS)(given(*drawn)(check))
)
