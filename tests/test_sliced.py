"""LoRA on slices of a fused kernel: by hand, in a stack, in every optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import compose, optim
from lorax.adapters import SlicedLora
from tests import programs

IN, PARTS, OUT, RANK = 6, 3, 4, 2


def program(params, x):
    """A stack of two fused kernels, as GPT-2's qkv under scan."""

    def step(x, w):
        y = jnp.einsum("bi,ipo->bpo", x, w)
        return jnp.tanh(x + jnp.pad(y.sum(1), ((0, 0), (0, IN - OUT)))), y

    return jax.lax.scan(step, x, params["w"])[0]


def made(layers=None):
    params = {"w": programs.normal(1, 2, IN, PARTS, OUT)}
    x = programs.normal(2, 5, IN)
    kernels = lorax.discover(program, params, x)
    target = lorax.Target("w", RANK, 3.0, slices=(0, 2), layers=layers)
    adapters, params = lorax.init(jax.random.key(0), params, [target], kernels)
    return programs.perturbed(adapters, 0.3), params, x


def by_hand(adapter, kernel, layers):
    """The merged kernel in float64, slice by slice."""
    whole = np.array(kernel, np.float64)
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    for i, layer in enumerate(layers):
        for j, part in enumerate((0, 2)):
            whole[layer, :, part] += adapter.scale * a[i, j] @ b[i, j]
    return whole


@pytest.mark.parametrize("layers", [None, (1,)])
def test_each_slice_has_its_own_pair_and_the_others_stay(layers):
    adapters, params, x = made(layers)
    adapter = adapters["w"]
    count = 2 if layers is None else 1
    assert isinstance(adapter, SlicedLora)
    assert adapter.a.shape == (count, 2, IN, RANK)
    assert adapter.b.shape == (count, 2, RANK, OUT)
    merged = lorax.merge(adapters, params)
    expected = by_hand(adapter, params["w"], layers or (0, 1))
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["w"][:, :, 1], params["w"][:, :, 1])
    adapted = lorax.adapt(program, on_merge="error")(adapters, params, x)
    np.testing.assert_allclose(adapted, program(merged, x), rtol=1e-5, atol=1e-6)


def test_as_one_lora_of_the_summed_rank():
    adapters, params, _ = made()
    one = compose.to_lora(adapters)["w"]
    assert one.rank == 2 * RANK
    assert not np.any(one.b[:, :RANK, 1:]) and not np.any(one.b[:, RANK:, :2])
    np.testing.assert_allclose(
        one.merge(params["w"]), adapters["w"].merge(params["w"]), rtol=1e-6
    )


@pytest.mark.parametrize(
    "tx",
    [
        optim.lora_plus(1e-2, ratio="auto"),
        optim.lora_pro(1e-2),
        optim.muon(1e-2),
        optim.scale_by_lora_pro_rowcol(),
        optax.chain(optax.sgd(1e-2), optim.add_decayed_spectral_norm(0.1)),
    ],
    ids=["lora_plus", "lora_pro", "muon", "rowcol", "spectral"],
)
def test_optimisers_see_each_slice_as_a_kernel_of_its_own(tx):
    """Two slices move like two Loras on two kernels."""
    adapters, params, _ = made()
    adapter = adapters["w"]
    grads = {"w": programs.perturbed(adapters, 0.5)["w"]}
    flat = lorax.Axes((1,), (2,), (0,))

    def apart(sliced):
        """One Lora per slice."""
        return {
            f"w{j}": lorax.adapters.Lora(sliced.a[:, j], sliced.b[:, j], 1.5, flat)
            for j in range(2)
        }

    own = apart(adapter)
    update = lambda tx, g, a: tx.update(g, tx.init(a), a)[0]
    ours = update(tx, grads, adapters)["w"]
    theirs = update(tx, apart(grads["w"]), own)
    for j in range(2):
        for field in ("a", "b"):
            np.testing.assert_allclose(
                getattr(ours, field)[:, j],
                getattr(theirs[f"w{j}"], field),
                rtol=1e-4,
                atol=1e-6,
            )


def test_ranks_that_differ_are_stacked_and_taken_apart():
    adapters, params, _ = made()
    cut = jax.tree.map(jnp.copy, adapters["w"])
    narrow = {"w": cut.replace(a=cut.a[..., :1], b=cut.b[:, :, :1])}
    again = compose.unstack(compose.stack([narrow, adapters]))
    for sets, want in zip(again, (narrow, adapters), strict=True):
        assert sets["w"].rank == want["w"].rank
        got, want = (lorax.merge(s, params)["w"] for s in (sets, want))
        np.testing.assert_array_equal(got, want)


def test_slices_that_mean_nothing():
    with pytest.raises(ValueError, match="slices=.* needs adapter='lora'"):
        lorax.Target("w", adapter="dora", slices=(0,))
    with pytest.raises(ValueError, match=r"slices=\(2, 0\); give increasing"):
        lorax.Target("w", slices=(2, 0))
    params = {"w": programs.normal(1, 2, IN, PARTS, OUT), "v": programs.normal(1, 4, 4)}
    x = programs.normal(2, 5, IN)
    kernels = lorax.discover(program, {"w": params["w"]}, x)
    make = lambda target: lorax.init(
        jax.random.key(0), {"w": params["w"]}, [target], kernels
    )
    with pytest.raises(ValueError, match=r"slices=\(1, 3\), but .* has size 3"):
        make(lorax.Target("w", RANK, slices=(1, 3)))
    with pytest.raises(ValueError, match="above the 4 outputs of a slice"):
        make(lorax.Target("w", 5, slices=(1,)))
    with pytest.raises(ValueError, match="of 1 out axes"):
        lorax.init(
            jax.random.key(0), {"v": params["v"]}, [lorax.Target("v", 2, slices=(0,))]
        )
    adapters, _, _ = made()
    with pytest.raises(ValueError, match=r"slices \(0, 2\) of 3, but the leaf"):
        lorax.merge(adapters, {"w": jnp.zeros((2, IN, 4, OUT))})
