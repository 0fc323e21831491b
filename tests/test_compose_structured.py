"""Updates not of the form a b, as plain Lora: LoHa, MiSS and LoKr, by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import compose
from lorax.adapters import LoHa, LoKr, MiSS
from tests import adapter_sets as make
from tests.programs import normal

BATCH, IN, OUT = (2,), (2, 3), (5, 2)
AXES = make.axes_of(IN, OUT, BATCH)
STATIC = {"scale": 1.5, "axes": AXES, "layers": (0, 2)}
SIZES = {"in_sizes": IN, "out_sizes": OUT}
LEAF = jnp.zeros((3, *IN, *OUT))


def flat(array, reads):
    """`[layers, .., ..]` in float64, in and out axes flattened."""
    array = np.asarray(array, np.float64)
    return array.reshape(2, 6, -1) if reads else array.reshape(2, -1, 10)


def loha(seed, rank=2):
    reads, writes = (*BATCH, *IN, rank), (*BATCH, rank, *OUT)
    shapes = {"a1": reads, "b1": writes, "a2": reads, "b2": writes}
    return LoHa(**arrays(seed, shapes), **STATIC)


def loha_update(adapter):
    one, two = (
        flat(getattr(adapter, f"a{i}"), True) @ flat(getattr(adapter, f"b{i}"), False)
        for i in (1, 2)
    )
    return 1.5 * one * two


def miss(seed, rank=4):
    """Rows i mod r, whether or not the rank divides the six inputs."""
    found = arrays(seed, {"block": (*BATCH, rank, *OUT)})
    return MiSS(**found, **STATIC, in_sizes=IN)


def miss_update(adapter):
    rows = [i % adapter.rank for i in range(6)]
    return 1.5 * flat(adapter.block, False)[:, rows]


def lokr(seed, **shapes):
    return LoKr(**arrays(seed, shapes), **STATIC, **SIZES)


def thick(seed):
    return lokr(seed, w1=(*BATCH, 2, 5), w2=(*BATCH, 3, 2))


def thin(seed):
    w1 = {"w1_a": (*BATCH, 3, 1), "w1_b": (*BATCH, 1, 2)}
    return lokr(seed, **w1, w2_a=(*BATCH, 2, 1), w2_b=(*BATCH, 1, 5))


def lokr_update(adapter):
    held = {name: np.asarray(getattr(adapter, name), float) for name in adapter.roles}
    either = lambda n: held[n] if n in held else held[n + "_a"] @ held[n + "_b"]
    pairs = zip(either("w1"), either("w2"), strict=True)
    return 1.5 * np.stack([np.kron(*pair) for pair in pairs])


def arrays(seed, shapes):
    return {n: normal(seed + i, *shape) for i, (n, shape) in enumerate(shapes.items())}


# (adapter, its update, the rank of its Lora, the rank of a sum of two)
FORMS = {
    "loha": (loha, loha_update, 4, 8),
    "miss": (miss, miss_update, 4, 4),
    "lokr": (thick, lokr_update, 4, 8),
    "thin lokr": (thin, lokr_update, 1, 2),
}
forms = pytest.mark.parametrize("maker,update,rank,both", FORMS.values(), ids=FORMS)


@forms
def test_as_lora_is_the_same_update(maker, update, rank, both):
    adapter = maker(1)
    (plain,) = compose.to_lora({"w": adapter}).values()
    assert type(plain) is lorax.Lora and plain.rank == rank
    make.close(make.delta(plain).reshape(2, 6, 10), update(adapter))
    merged = np.asarray(adapter.delta(LEAF)[jnp.array([0, 2])])
    make.close(merged.reshape(2, 6, 10), update(adapter))
    plain.check("w", LEAF)
    assert plain.layers == (0, 2)


@forms
def test_sums_are_those_of_the_updates(maker, update, rank, both):
    """Two MiSS adapters share a constant `a`: their sum has the rank of one."""
    one, two = {"w": maker(1)}, {"w": maker(7)}
    got, error = compose.combine([one, two], [1.0, -0.5])
    want = update(one["w"]) - 0.5 * update(two["w"])
    make.close(make.delta(got["w"]).reshape(2, 6, 10), want)
    assert got["w"].rank == both and float(error["w"]) == 0


def test_they_are_cut_as_lora():
    plain = compose.to_lora({"w": loha(1)})
    got, error = compose.resize(plain, 2)
    u, s, vt = np.linalg.svd(loha_update(loha(1)), full_matrices=False)
    want = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
    make.close(make.delta(got["w"]).reshape(2, 6, 10), want)
    lost = np.sqrt((s[:, 2:] ** 2).sum() / (s**2).sum())
    np.testing.assert_allclose(error["w"], lost, rtol=1e-4)
    with pytest.raises(ValueError, match="LoHa is not one; convert it to Lora first"):
        compose.resize({"w": loha(1)}, 2)


@pytest.mark.parametrize("maker", [miss, thick])
def test_without_the_sizes_of_the_leaf_it_is_refused(maker):
    """Older files have none: the leaf's axes cannot be guessed."""
    adapter = maker(1).replace(in_sizes=None)
    with pytest.raises(ValueError, match=r"\['w'\] are (MiSS|LoKr).*compose.extract"):
        compose.to_lora({"w": adapter})


@pytest.mark.parametrize("name", ["loha", "miss", "lokr"])
def test_what_init_makes_has_a_lora_form_in_populations_too(name):
    params = {"w": jnp.ones((6, 10))}
    target = lorax.Target("w", 2, adapter=name)
    make_one = lambda key: lorax.init(key, params, target)[0]
    many = jax.vmap(make_one)(jax.random.split(jax.random.key(0), 3))
    plain = compose.to_lora(many)["w"]
    assert plain.a.shape[:2] == (3, 6) and plain.b.shape[::2] == (3, 10)
