"""Paths, selection by path, and the trees that parameters come in."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import lorax
from lorax import tree


@flax.struct.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array
    name: str = flax.struct.field(pytree_node=False, default="layer")


class Boxed(nn.Module):
    """A layer whose kernel is created in a sharding box."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
        return nn.Dense(3, kernel_init=init, name="dense")(x)


KERNEL, BIAS = jnp.ones((4, 3)), jnp.zeros(3)
DENSE = {"kernel": KERNEL, "bias": BIAS}
X = jnp.ones((2, 4))
PLAIN = {"bias", "kernel"}


def nnx_state():
    return nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))[1]


TREES = {
    "dict": ({"dense": DENSE}, {"dense/bias", "dense/kernel"}),
    "variables": ({"params": {"dense": DENSE}}, {"dense/bias", "dense/kernel"}),
    "statistics": (
        {"params": DENSE, "batch_stats": {"mean": BIAS}},
        PLAIN | {"batch_stats/mean"},
    ),
    "frozen": (
        FrozenDict({"params": {"dense": DENSE}}),
        {"dense/bias", "dense/kernel"},
    ),
    "lists": (
        {"layers": [DENSE, DENSE]},
        {f"layers/{i}/{n}" for i in "01" for n in PLAIN},
    ),
    "tuple": ((KERNEL, (BIAS,)), {"0", "1/0"}),
    "dataclass": ({"first": Layer(KERNEL, BIAS)}, {"first/kernel", "first/bias"}),
    "boxed": (Boxed().init(jax.random.key(0), X), {"dense/kernel", "dense/bias"}),
    "state": (nnx_state(), PLAIN),
    "pure dict": (nnx.to_pure_dict(nnx_state()), PLAIN),
    "none": ({"kernel": KERNEL, "bias": None}, {"kernel"}),
    "named value": ({"value": {"value": KERNEL}}, {"value/value"}),
    "empty": ({}, set()),
}


@pytest.mark.parametrize("name", TREES)
def test_paths(name):
    params, paths = TREES[name]
    assert set(tree.flatten(params)) == paths
    same = tree.replace(params, tree.flatten(params))
    assert jax.tree.structure(same) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(params)))


@pytest.mark.parametrize("name", [name for name in TREES if name != "empty"])
def test_the_verbs_keep_the_kind_of_every_tree(name):
    """Boxes, states, dataclasses and frozen dicts keep their types."""
    params, paths = TREES[name]
    kernel = next(p for p in sorted(paths) if tree.flatten(params)[p].ndim == 2)
    fn = lambda params, x: x @ tree.flatten(params)[kernel]
    adapters, params = lorax.init(
        jax.random.key(0), params, [(kernel, 2)], lorax.discover(fn, params, X)
    )
    lora = adapters[kernel]
    adapters = {kernel: lora.replace(b=jnp.ones_like(lora.b))}
    merged = lorax.merge(adapters, params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    want = X @ (tree.flatten(params)[kernel] + 8 * lora.a @ jnp.ones((2, 3)))
    np.testing.assert_allclose(fn(merged, X), want, rtol=1e-6)
    adapted = lorax.adapt(fn, on_merge="error")
    np.testing.assert_allclose(adapted(adapters, params, X), want, rtol=1e-6)


def test_two_leaves_with_one_path_are_an_error():
    clash = {"params": {"kernel": KERNEL}, "kernel": KERNEL}
    with pytest.raises(
        ValueError, match=r"the path 'kernel' .*\['params'\]\['kernel'\]"
    ):
        tree.flatten(clash)
    for verb in (
        lambda: lorax.init(jax.random.key(0), clash, "kernel"),
        lambda: lorax.merge({}, clash),
        lambda: lorax.discover(lambda params: 0.0, clash),
        lambda: lorax.adapt(lambda params: 0.0)({}, clash),
    ):
        with pytest.raises(ValueError, match="rename one"):
            verb()


def test_an_unknown_path_names_its_neighbours():
    with pytest.raises(
        KeyError, match="no leaf 'dense/kernal'; nearest.*'dense/kernel'"
    ):
        tree.replace({"dense": DENSE}, {"dense/kernal": KERNEL})
    with pytest.raises(KeyError, match="no leaves at all"):
        tree.replace({}, {"dense/kernel": KERNEL})


def test_match_is_of_the_whole_path():
    assert tree.match(".*/kernel", "dense/kernel")
    assert not tree.match("kernel", "dense/kernel")
    assert not tree.match("dense", "dense/kernel")


def test_what_counts_as_floating():
    yes = (
        KERNEL,
        np.ones(2),
        jnp.ones(2, jnp.bfloat16),
        jnp.ones(2, jnp.float8_e4m3fn),
    )
    no = (jnp.arange(2), jnp.array(True), jax.random.key(0), 1.0, "s", jnp.ones(2) * 1j)
    assert all(map(tree.is_floating, yes)) and not any(map(tree.is_floating, no))
    assert tree.is_floating(jax.ShapeDtypeStruct((2,), jnp.float16))
    assert tree.is_concrete(KERNEL) and tree.is_concrete(np.ones(2))
    assert not tree.is_concrete(jax.ShapeDtypeStruct((2,), jnp.float32))
    jax.eval_shape(lambda x: None if not tree.is_concrete(x) else 1 / 0, KERNEL)


def test_keys_depend_on_the_path_alone():
    key = jax.random.key(0)
    data = lambda path: jax.random.key_data(tree.fold_path(key, path)).tolist()
    assert data("a/kernel") == data("a/kernel")
    assert data("a/kernel") != data("b/kernel")


def test_partition_and_combine():
    lora = lorax.Lora(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0, lorax.Axes((0,), (1,)))
    adapters = {"kernel": lora, "bias": lorax.Full(BIAS), "scale": lorax.Full(BIAS)}
    full, rest = tree.partition(adapters, lambda path, a: isinstance(a, lorax.Full))
    assert list(full) == ["bias", "scale"] and list(rest) == ["kernel"]
    assert tree.combine(full, rest) == adapters
    with pytest.raises(ValueError, match=r"twice for \['bias', 'scale'\]"):
        tree.combine(full, adapters)
    ranks = tree.map_adapters(lambda path, a: (path, a.rank), rest)
    assert ranks == {"kernel": ("kernel", 1)}
