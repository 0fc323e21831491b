"""Random programs over random adapted kernels: adapt is merge-then-apply, exactly.

A random program is data: leaves with an axis kind per dimension, and instructions of
small integers that are always valid (each picks among what is possible), so hypothesis
can shrink them. All in float64, where the two sides differ only by rounding.
"""

import functools
import math
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import lorax
from lorax import interpret
from tests import programs
from tests.random_adapters import FORMS, PLAIN, adapter_of, made
from tests.random_views import EDITS, JOINS, view
from tests.random_views import split as view_split

SETTINGS = dict(
    deadline=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
HALF_DRAWS = 12
T, WIDTH = 2, 6  # every activation is [T, WIDTH]
small = st.integers(0, 11)
edits = st.lists(st.tuples(small, small, small), max_size=4)


@st.composite
def leaves(draw):
    """A shape with the kind of each dimension: at least one in and one out."""
    kinds = [
        "in",
        "out",
        *draw(st.lists(st.sampled_from(["in", "out", "batch"]), max_size=2)),
    ]
    kinds = draw(st.permutations(kinds))
    sizes = [draw(st.sampled_from([2, 4])) for _ in kinds]
    if kinds.count("in") > 1 and draw(st.booleans()):
        sizes[kinds.index("in")] = 1
    return list(zip(kinds, sizes, strict=True))


class Record:
    """A visitor that follows views and counts merges."""

    merges = 0

    def merge(self, walker, eqn, view):
        self.merges += 1
        return interpret.dense(view)


def update(adapter, shape):
    """scale * a @ b in the leaf's layout, in numpy alone."""
    letters = "abcdefgh"[: len(shape)]
    in_, out, batch = ("".join(letters[d] for d in group) for group in adapter.axes)
    sums = f"{batch}{in_}r,{batch}r{out}->{letters}"
    return 0.5 * np.einsum(sums, np.asarray(adapter.a), np.asarray(adapter.b))


@settings(max_examples=40, **SETTINGS)
@given(
    leaves(), edits, st.lists(st.tuples(st.integers(0, 2), small, small), max_size=2)
)
def test_views_carry_their_factors(dims, instructions, joins):
    with jax.enable_x64(True):
        shape = tuple(size for _, size in dims)
        leaf = np.random.RandomState(0).randn(*shape)
        adapter = adapter_of(dims, 2, 1)

        def edited(xp, w):
            w, now = view(xp, w, dims, instructions)
            for code, i, j in joins:
                w, now = JOINS[code](xp, w, now, i, j)
            return w

        jaxpr = jax.make_jaxpr(lambda w: edited(jnp, w))(leaf)
        record = Record()

        @jax.jit  # one program instead of one per edit
        def walked(leaf, adapter):
            kernel = interpret.watch("w", leaf)
            kernel = kernel.adapted(adapter.factors(leaf), adapter.axes)
            (got,) = interpret.Walker(record).run(jaxpr, [kernel])
            assert isinstance(got, interpret.Tracked)
            return interpret.dense(got), got.value

        dense, value = walked(leaf, adapter)
        assert record.merges == 0
        want = edited(np, leaf + update(adapter, shape))
        np.testing.assert_allclose(dense, want, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(value, edited(np, leaf), rtol=1e-15)


EXPERTS = 7  # above this `order`, a stack may be summed or written


def with_a_rule(dot):
    """The same product with a custom derivative rule."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def product(x, w, numbers):
        return dot(x, w, numbers)

    def forward(x, w, numbers):
        return jax.vjp(lambda x, w: dot(x, w, numbers), x, w)

    product.defvjp(forward, lambda _, pull, g: pull(g))
    return product


def contract(x, w, dims, tied, left, order, dot=jax.lax.dot_general):
    """One dot of an activation [T, WIDTH] with a view; returns [T, WIDTH].

    If `order` is high, an axis of stacked kernels may be summed or written, as in
    mixtures of experts; if it is odd, the dot has its own backward pass.
    """
    read = "out" if tied else "in"
    draw = np.random.RandomState(order)
    of = lambda *kinds: [d for d, (k, _) in enumerate(dims) if k in kinds]
    parts = draw.randint(3, size=len(dims)) if order > EXPERTS else [0] * len(dims)
    batch = [d for d in of("batch", "taken") if parts[d] == 0]
    summed = [d for d in of("batch", "taken") if parts[d] == 1]
    reads = list(draw.permutation([*of(read), *summed]))
    shape = [dims[d][1] for d in (*batch, *reads)]
    mix = np.cos(np.arange(WIDTH * math.prod(shape))).reshape(WIDTH, *shape)
    w = w.astype(x.dtype)  # an edit may have widened it
    x = jnp.tensordot(x, mix.astype(x.dtype), 1)  # [T, *batch, *reads]
    n = len(batch)
    x_dims = ([*range(1 + n, x.ndim)], [*range(1, 1 + n)])
    pairs = [(tuple(a), tuple(b)) for a, b in zip(x_dims, (reads, batch), strict=True)]
    dot = with_a_rule(dot) if order % 2 else dot
    if left:
        y = dot(w, x, tuple((b, a) for a, b in pairs))
        y = jnp.moveaxis(y, -1, 0)  # [T, *batch, *write]
    else:
        y = dot(x, w, tuple(pairs))
        y = jnp.moveaxis(y, n, 0)
    y = y.reshape(T, -1)
    back = np.sin(np.arange(y.shape[1] * WIDTH)).reshape(-1, WIDTH)
    return jnp.tanh(y @ back.astype(y.dtype) / (1 + y.shape[1]))


def plain(use, w, x):
    return use(w, x)


def jitted(use, w, x):
    return jax.jit(use)(w, x)


def rematerialised(use, w, x):
    return jax.checkpoint(lambda x: use(w, x))(x)  # the kernel closed over


def scanned(use, w, x):
    return jax.lax.scan(lambda x, _: (use(w, x), None), x, length=2)[0]


def carried(use, w, x):
    return jax.lax.fori_loop(0, 2, lambda i, wx: (wx[0], use(*wx)), (w, x))[1]


def chosen(use, w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda w: use(w, x), lambda w: use(w, -x) / 2, w)


def mapped(use, w, x):
    return jax.vmap(lambda row: use(w, jnp.tile(row, (T, 1)))[0])(x)


def stopped(use, w, x):
    return use(jax.lax.stop_gradient(w), x) + use(w, x)


def barred(use, w, x):
    return use(*jax.lax.optimization_barrier((w, x)))


def layered(use, w, x):
    """Scans over the first axis if that is a stack of kernels: see `program`."""
    return jax.lax.scan(lambda x, w: (use(w, x), None), x, w)[0]


def handed_back(use, w, x):
    """Like `nnx.scan(nnx.remat(...))`: the layer returns its kernel for later use."""
    layer = jax.checkpoint(lambda x, w: (use(w, x), w))
    return layered(use, *reversed(jax.lax.scan(layer, x, w)))


WRAPPERS = [
    plain,
    jitted,
    rematerialised,
    scanned,
    carried,
    chosen,
    mapped,
    stopped,
    barred,
]
CURVED = [
    lambda w: jnp.sin(w),
    lambda w: w * w,
    lambda w: w + 1.0,
    lambda w: jnp.sum(w) * w,
    lambda w: jnp.cumsum(w, 0),
    lambda w: jnp.where(w > 0, w, 2 * w),
    lambda w: jnp.tensordot(w, w, w.ndim) * w,
]
uses = st.tuples(small, small, edits, st.booleans(), st.booleans(), small)


def program(leaves, instructions, curved=None, dot=jax.lax.dot_general):
    """The function that the instructions mean; `curved` is applied to one kernel."""

    def fn(params, x):
        for n, (which, wrap, changes, tied, left, order) in enumerate(instructions):
            dims, w = leaves[which % len(leaves)], params[f"w{which % len(leaves)}"]
            wrapper = WRAPPERS[wrap % len(WRAPPERS)]
            if dims[0][0] == "batch" and wrap > 5:
                wrapper, dims = handed_back if wrap > 8 else layered, dims[1:]

            def use(
                w, x, dims=dims, changes=changes, tied=tied, left=left, order=order
            ):
                w, now = view(jnp, w, dims, changes)
                return contract(x, w, now, tied, left, order, dot)

            if curved is not None and n == 0:
                w = curved(w)
            x = x + wrapper(use, w, x)
        wide = jnp.promote_types(x.dtype, jnp.float32)  # half would round the sum
        return jnp.sum(jnp.sin(x), dtype=wide)

    return fn


def compared(leaves, instructions, curved=None, on_merge="error", kinds=PLAIN):
    """Runs a program both ways; returns what discover said about its kernels."""
    with jax.enable_x64(True):
        fn = program(leaves, instructions, curved)
        shapes = [tuple(size for _, size in dims) for dims in leaves]
        draw = np.random.RandomState(3).randn
        params = {f"w{i}": draw(*s) for i, s in enumerate(shapes)}
        params, x = jax.device_put((params, draw(T, WIDTH)))
        kernels = lorax.discover(fn, params, x)
        own = enumerate(zip(leaves, kinds, strict=False))
        adapters = {f"w{i}": made(kind, d, 1 + i, i) for i, (d, kind) in own}
        adapted = lorax.adapt(fn, on_merge=on_merge, custom_rules="branch")
        sides = adapted, programs.definition(fn)
        both = lambda *args: [jax.value_and_grad(side)(*args) for side in sides]
        lowered = jax.jit(both).lower(adapters, params, x)  # compiled as fast as can be
        compiled = lowered.compile({"xla_backend_optimization_level": 0})
        got, want = compiled(adapters, params, x)
        norm = math.sqrt(sum(np.sum(np.square(w)) for w in jax.tree.leaves(want)))
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-9 * norm)
        return kernels


def parts_an_axis(instructions):
    """Whether an axis of experts may be split, one part summed and the other written.

    Its factors would be partly read and partly written: such a kernel is merged.
    """
    split = EDITS.index(view_split)
    return any(
        order > EXPERTS and any(code % len(EDITS) == split for code, *_ in changes)
        for *_, changes, _, _, order in instructions
    )


def check_linear(leaves, instructions, kinds):
    """Thin products follow everywhere; gains and maps are merged where they cannot."""
    if parts_an_axis(instructions) or kinds[: len(leaves)] != PLAIN[: len(leaves)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lorax.MergeWarning)
            compared(leaves, instructions, on_merge="warn", kinds=kinds)
        return
    kernels = compared(leaves, instructions)
    used = {f"w{which % len(leaves)}" for which, *_ in instructions}
    for path, kernel in kernels.items():
        assert kernel.op == ("dot" if path in used else "unused")
        if all(order <= EXPERTS for *_, order in instructions):
            assert all(use.fast for use in kernel.uses) and not kernel.conflicts


def check_curved(leaves, instructions, curved):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernels = compared(leaves, instructions, CURVED[curved % len(CURVED)], "warn")
    path = f"w{instructions[0][0] % len(leaves)}"
    assert not all(use.fast for use in kernels[path].uses)
    merged = [str(w.message) for w in caught if w.category is lorax.MergeWarning]
    assert merged and all(message.startswith(f"{path}: ") for message in merged)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")  # 64 bits, of an edit
def check_half(leaves, instructions):
    """In float16 adapt is as close to float64 as merging is, over draws of the numbers.

    One draw says little: a sum of few cancelling terms rounds well or badly by luck.
    The root mean square over draws may be half as large again, plus one ulp.
    """
    fn = program(leaves, instructions)
    shapes = [tuple(size for _, size in dims) for dims in leaves]
    made = {f"w{i}": adapter_of(d, 1 + i, i) for i, d in enumerate(leaves)}
    adapted = lorax.adapt(fn, on_merge="error", custom_rules="branch")
    sides = adapted, programs.definition(fn)

    def drawn(seed):
        draw = np.random.RandomState(seed).randn
        half = lambda *shape: (draw(*shape) / 2).astype(np.float16)
        params = {f"w{i}": half(*s) for i, s in enumerate(shapes)}
        adapters = jax.tree.map(lambda f: draw(*f.shape).astype(np.float32), made)
        return adapters, params, half(T, WIDTH)

    def found(side, many):
        step = jax.jit(jax.value_and_grad(side)).lower(*many[0])
        step = step.compile({"xla_backend_optimization_level": 0})
        leaves = [jax.tree.leaves(step(*args)) for args in many]
        wide = lambda leaf: np.ravel(np.asarray(leaf, np.float64))
        return np.stack([np.concatenate([*map(wide, own)]) for own in leaves])

    many = [*map(drawn, range(HALF_DRAWS))]
    ours, merged = (found(side, many) for side in sides)
    with jax.enable_x64(True):
        wide = lambda args: jax.tree.map(lambda x: np.asarray(x, np.float64), args)
        exact = found(sides[1], [*map(wide, many)])
    norm = np.linalg.norm
    ulp = float(jnp.finfo(jnp.float16).eps) * norm(exact)
    assert norm(ours - exact) <= 1.5 * norm(merged - exact) + ulp


some_leaves = st.lists(leaves(), min_size=1, max_size=2)
some_uses = st.lists(uses, min_size=1, max_size=2)
some_kinds = st.lists(
    st.sampled_from(["lora", *FORMS]), min_size=len(PLAIN), max_size=len(PLAIN)
)
test_linear_programs_merge_nothing = settings(max_examples=25, **SETTINGS)(
    given(some_leaves, some_uses, some_kinds)(check_linear)
)
test_other_uses_merge_and_are_right = settings(max_examples=10, **SETTINGS)(
    given(some_leaves, some_uses, small)(check_curved)
)
test_half_precision_costs_nothing_more = settings(max_examples=8, **SETTINGS)(
    given(some_leaves, some_uses)(check_half)
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
@settings(max_examples=150, **SETTINGS)
@given(some_leaves, some_uses)
def test_many_more_in_half_precision(leaves, instructions):
    check_half(leaves, instructions)


@pytest.mark.slow
@settings(max_examples=1000, **SETTINGS)
@given(some_leaves, some_uses, some_kinds, st.none() | small)
def test_many_more_programs(leaves, instructions, kinds, curved):
    if curved is None:
        check_linear(leaves, instructions, kinds)
    else:
        check_curved(leaves, instructions, curved)
