"""What all optimisers share: every row of rows.py goes through the same tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax.adapters import AdaLora, Full, Lora
from lorax.types import PairStatics
from tests.optim import problems
from tests.optim.rows import ROWS

# A third of the rows also runs on the second version of Python and jax.
PARAMS = [
    pytest.param(row, id=row.name, marks=pytest.mark.once if i % 3 else ())
    for i, row in enumerate(ROWS)
]
rows = pytest.mark.parametrize("row", PARAMS)
# Wrappers see a method's chain, which is the same for all its modes.
FIRST = {row.make: row for row in ROWS[::-1]}.values()
first_rows = pytest.mark.parametrize("row", [p for p in PARAMS if p.values[0] in FIRST])


def whole_tree(row, b=1.0):
    """Adapters of every class that the row acts on, in every layout."""
    adapters = {leaf: problems.lora(leaf, b=b, seed=i) for i, leaf in enumerate(LEAVES)}
    adapters |= {"dora": problems.dora("heads", seed=20), "bias": problems.full()}
    if row.adalora:
        adapters |= SVD
    return adapters


LEAVES = problems.LEAVES
SMALL = {"w": problems.lora(), "bias": problems.full()}
SVD = {"svd": problems.adalora("stacked", seed=30)}


OUT = {
    "out": problems.lora("stacked", seed=40),
    "out/dora": problems.dora("heads", seed=50),
    "out/bias": problems.full(seed=60),
    "out/svd": problems.adalora(seed=70),
}
"""What path-selecting wrappers leave out."""


def small(row):
    """One pair, one leaf trained whole, and an AdaLora if the row needs it."""
    return {**SMALL, **(SVD if row.needs_svd else {})}


def make(row, **more):
    return row.make(**row.kwargs, **more)


def compiled(function, *args):
    """The results of a jitted function, compiled as quickly as XLA can."""
    lowered = jax.jit(function).lower(*args)
    return lowered.compile({"xla_backend_optimization_level": 0})(*args)


def kind(tree):
    """Structure, shapes, dtypes and weak types of a state."""
    leaf = lambda v: (v.shape, v.dtype, getattr(v, "weak_type", False))
    return jax.tree.structure(tree), [
        leaf(jnp.asarray(v)) for v in jax.tree.leaves(tree)
    ]


@rows
def test_state_keeps_its_kind_and_the_second_call_does_not_retrace(row):
    adapters, tx = whole_tree(row), make(row)
    abstract = jax.eval_shape(tx.init, adapters)
    state = tx.init(adapters)
    shapes = lambda tree: [(v.shape, v.dtype) for v in jax.tree.leaves(tree)]
    assert shapes(abstract) == shapes(state)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    traces = []

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def update(grads, state, adapters):
        traces.append(1)
        updates, state = tx.update(grads, state, adapters, **row.extra)
        return updates, state, optax.apply_updates(adapters, updates)

    for seed in (0, 1):
        grads = problems.like(adapters, seed)
        updates, after, new = update(grads, state, adapters)
        assert kind(after) == kind(state)
        assert kind(updates) == kind(adapters) == kind(new)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        state, adapters = after, new
    assert len(traces) == 1
    assert any(np.any(u) for u in jax.tree.leaves(updates["dora"]))


@functools.cache
def wrapped(name):
    """Updates of a small tree, alone and inside optax's wrappers, in one program."""
    row = next(row for row in ROWS if row.name == name)
    label = lambda path: "out" if path in OUT else "own"
    labels = lambda tree: {path: label(path) for path in tree}
    leafwise = lambda tree: {
        path: jax.tree.map(lambda _, path=path: path not in OUT, a)
        for path, a in tree.items()
    }
    split = lambda: {"own": make(row), "out": optax.set_to_zero()}
    wrappers = {
        "plain": lambda: make(row),
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1e9), make(row)),
        "multi_steps": lambda: optax.MultiSteps(make(row), 2).gradient_transformation(),
        "hyperparams": lambda: optax.inject_hyperparams(row.make, row.static)(
            **row.kwargs
        ),
        # whole adapters left out, of every class
        "masked": lambda: optax.masked(
            make(row), lambda t: {p: p not in OUT for p in t}
        ),
        "masked_leaves": lambda: optax.masked(make(row), leafwise),
        "partition": lambda: optax.partition(split(), labels),
    }

    def updates(grads, adapters):
        results = {}
        for name, wrap in wrappers.items():
            tx = wrap()
            if name.startswith(("masked", "partition")):
                grads, adapters = {**grads, **OUT}, {**adapters, **OUT}
            state = tx.init(adapters)
            for _ in range(2 if name == "multi_steps" else 1):
                result, state = tx.update(grads, state, adapters, **row.extra)
            results[name] = result
        return results

    return compiled(updates, problems.like(small(row)), small(row))


@pytest.mark.parametrize(
    "name",
    ["chain", "multi_steps", "hyperparams", "masked", "masked_leaves", "partition"],
)
@first_rows
def test_inside_optax_wrappers(row, name):
    results = wrapped(row.name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    got, want = dict(results[name]), results["plain"]
    for path, adapter in OUT.items() if len(got) > len(want) else ():
        left = 0.0 if name == "partition" else 1.0  # masked passes what it leaves out
        other = jax.tree.map(lambda v, left=left: left * v, adapter)
        jax.tree.map(np.testing.assert_array_equal, got.pop(path), other)
    jax.tree.map(close, got, want)
    assert np.any(results["plain"]["w"].b)


@rows
def test_a_population_is_its_members(row):
    """vmap over members of one padded rank, each with its own scale and true rank."""
    ranks, scales = jnp.array([3, 1, 2]), jnp.array([1.5, 0.5, 3.0])
    lora, grad = problems.lora(rank=3), problems.lora(rank=3, seed=7)
    tx = make(row)

    def padded(lora, rank):
        real = jnp.arange(3) < rank
        return lora.replace(
            a=jnp.where(real, lora.a, 0), b=jnp.where(real[:, None], lora.b, 0)
        )

    def two_updates(rank, scale, other_rank, other_scale):
        """Updates of two pairs of one shape: "v" is the next member's "w"."""
        tree = lambda x: {
            **small(row),
            "v": padded(x, other_rank),
            "w": padded(x, rank),
        }
        statics = PairStatics(scale, rank), PairStatics(other_scale, other_rank)
        extra = {"pairs": dict(zip("wv", statics, strict=True)), **row.extra}
        adapters, grads = tree(lora), tree(grad)
        state = tx.init(adapters)
        for _ in range(2):
            updates, state = tx.update(grads, state, adapters, **extra)
        return updates

    both = lambda *args: (
        jax.vmap(two_updates)(*args),
        jax.lax.map(lambda args: two_updates(*args), args),
    )
    following = lambda x: jnp.roll(x, -1)
    together, alone = compiled(both, ranks, scales, following(ranks), following(scales))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, together, alone)
    for field in "ab":
        v, w = (np.asarray(getattr(together[path], field)) for path in "vw")
        close(v, np.roll(w, -1, axis=0))
    for i, rank in enumerate([3, 1, 2]):
        assert not np.any(together["w"].a[i, :, rank:])
        assert not np.any(together["w"].b[i, rank:])
        assert np.any(together["w"].b[i, :rank])


@rows
def test_sharding_of_the_state_is_unchanged_by_an_update(row):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda v, *spec: jax.device_put(
        v, jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    lora = Lora(
        put(problems.draw(0, 8, 2), "x", None),
        put(problems.draw(1, 2, 16), None, "x"),
        1.5,
        problems.DENSE,
    )
    adapters = {"w": lora, "bias": Full(put(problems.draw(2, 8), "x"))}
    if row.needs_svd:
        p, q = problems.draw(3, 3, 8, 2), problems.draw(4, 3, 2, 16)
        split = put(p, None, "x"), put(problems.draw(5, 3, 2)), put(q, None, None, "x")
        adapters["svd"] = AdaLora(*split, 1.5, problems.LEAVES["stacked"][0])
    grads = jax.tree.map(lambda v: 2 * v, adapters)
    tx = make(row)
    state = tx.init(adapters)

    def step(grads, state, adapters):
        updates, state = tx.update(grads, state, adapters, **row.extra)
        return state, optax.apply_updates(adapters, updates)

    before, after = (state, adapters), compiled(step, grads, state, adapters)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        if old.ndim:
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim), (old, new)
    alone = jax.tree.map(lambda v: jnp.asarray(np.asarray(v)), (grads, adapters))
    _, want = compiled(step, alone[0], tx.init(alone[1]), alone[1])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, after[1], want)


@rows
def test_loss_falls_on_a_rank_r_regression_in_every_layout(row):
    """From b = 0, towards rank-r kernels near the span of a."""
    start = whole_tree(row, b=0.0)
    start = {path: a for path, a in start.items() if path in LEAVES}
    if row.adalora:
        svd = SVD["svd"]
        start["svd"] = svd.replace(lam=0 * svd.lam)
    kernels = {p: jnp.zeros(LEAVES.get(p, LEAVES["stacked"])[1]) for p in start}

    def teacher(path, adapter):
        second = problems.like(adapter, 50)
        fields = {
            f: getattr(adapter, f) + 0.2 * getattr(second, f)
            for f in "ap"
            if hasattr(adapter, f)
        }
        return second.replace(**fields).delta(kernels[path])

    targets = {path: teacher(path, a) for path, a in start.items()}

    def losses(adapters):
        off = lambda p: 0.5 * jnp.sum((adapters[p].delta(kernels[p]) - targets[p]) ** 2)
        return {path: off(path) for path in adapters}

    tx = make(row)

    def step(carry, _):
        adapters, state = carry
        grads = jax.grad(lambda a: sum(losses(a).values()))(adapters)
        updates, state = tx.update(grads, state, adapters, **row.extra)
        return (optax.apply_updates(adapters, updates), state), None

    def train(adapters):
        (after, _), _ = jax.lax.scan(step, (adapters, tx.init(adapters)), length=80)
        return losses(adapters), losses(after)

    before, after = compiled(train, start)
    for path in start:
        assert after[path] < 0.5 * before[path], (path, before[path], after[path])


@rows
def test_without_gradient_magnitude_and_full_leaves_keep_still(row):
    adapters = whole_tree(row)
    adapters = {p: a for p, a in adapters.items() if p in ("dora", "bias", "svd")}
    tx = make(row, weight_decay=0.1) if row.decays else make(row)
    zero = jax.tree.map(jnp.zeros_like, adapters)
    update = functools.partial(tx.update, **row.extra)
    updates, _ = compiled(update, zero, tx.init(adapters), adapters)
    assert not np.any(updates["dora"].magnitude) and not np.any(updates["bias"].value)
    if row.adalora and row.decays:
        pulled = updates["svd"].lam * adapters["svd"].lam
        assert np.all(pulled < 0), "the singular values decay"
    if row.decays:
        assert np.any(updates["dora"].b), "factors decay"


@rows
def test_errors(row):
    tx = make(row)
    with pytest.raises(
        ValueError, match="acts on the adapters that lorax.init returns"
    ):
        tx.init({"w": {"kernel": jnp.ones((2, 2))}})
    tree = small(row)
    state = tx.init(tree)
    with pytest.raises(ValueError, match="reads the adapters: call tx.update"):
        tx.update(tree, state, **row.extra)
    wide = {"w": jax.tree.map(lambda v: v.astype(jnp.complex64), SMALL["w"])}
    with pytest.raises(ValueError, match="w: .* needs real factors"):
        tx.init(wide)
    if not row.adalora:
        with pytest.raises(ValueError, match="svd: .* AdaLora"):
            tx.init({"svd": problems.adalora()})
    odd = {"odd": problems.Gated(jnp.ones((2, 2)), jnp.ones((2, 2)))}
    with pytest.raises(ValueError, match="odd: .* Gated declares none"):
        tx.init(tree | odd)
    own = {"own": problems.Own(jnp.ones((2, 1)), jnp.ones((1, 2)))}
    if not row.adalora:  # it reads a and b, and must know their product
        with pytest.raises(ValueError, match="own: .* a, b of Own are not such a pair"):
            tx.init(tree | own)
    by_role = lambda adapters: {p: a.replace(**a.roles) for p, a in adapters.items()}
    parts = dict.fromkeys(("a", "p", "lam"), optax.sgd(0.1))
    parted = optax.partition(
        {**parts, **dict.fromkeys(("b", "q", "value"), tx)}, by_role
    )
    if not row.adalora or row.needs_svd:
        with pytest.raises(
            ValueError,
            match=r"reads the factors.*hides .* from it; label whole adapter",
        ):
            parted.init(tree)
    if row.decays:  # one of our chains, not one made in this table
        with pytest.raises(ValueError, match="eps"):
            row.make(**{**row.kwargs, "eps": -1.0})
