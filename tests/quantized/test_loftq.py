"""LoftQ and QPiSSA against float64 numpy, PEFT's own function, and the plain codes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.interop import hf
from lorax.quantized import NF4, Int4, Int8, dequantize
from tests.data_paths import DATA, needs_data
from tests.quantized.matrices import codes_of, normal

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
SINGLE, AFFINE = NF4(double=False), Int4(symmetric=False)
TABLE = [  # QLoRA, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def error(adapters, params, dense):
    """The error of the merged kernels, relative to the dense ones."""
    merged = lorax.merge(adapters, params)
    flat = [lorax.tree.flatten(tree) for tree in (merged, dense)]
    lost = sum(float(jnp.sum((flat[0][p] - flat[1][p]) ** 2)) for p in adapters)
    return (lost / sum(float(jnp.sum(flat[1][p] ** 2)) for p in adapters)) ** 0.5


def nf4(w):
    """Codes and their decoded values, in float64."""
    blocks = w.reshape(-1, 64, w.shape[1])
    largest = np.abs(blocks).max(1, keepdims=True)
    codes = np.abs((blocks / largest)[..., None] - TABLE).argmin(-1)
    return codes.reshape(w.shape), (np.take(TABLE, codes) * largest).reshape(w.shape)


def int4(w):
    """Asymmetric: the symmetric form would round a group's largest weight, a tie."""
    blocks = w.reshape(-1, 64, w.shape[1])
    top = np.maximum(blocks.max(1, keepdims=True), 0)
    bottom = np.minimum(blocks.min(1, keepdims=True), 0)
    scale = (top - bottom) / 15
    zero = np.round(-8 - bottom / scale)
    codes = np.clip(np.round(blocks / scale + zero), -8, 7)
    values = (codes - zero) * scale
    return codes.reshape(w.shape).astype(int) % 16, values.reshape(w.shape)


def leading(w, rank):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("start", ["standard", "pissa"])
@pytest.mark.parametrize("form, by_hand", [(SINGLE, nf4), (AFFINE, int4)])
def test_the_papers_algorithm_in_float64(form, by_hand, start, steps):
    dense, rank = normal(128, 48), 6
    target = lorax.Target("w", rank=rank, alpha=3 * rank, init=start)
    given = lorax.init(KEY, {"w": jnp.asarray(dense)}, target)
    adapters, params = lorax.loftq(*given, [("w", form)], steps=steps)
    w = dense.astype(np.float64)
    update = leading(w, rank) if start == "pissa" else 0 * w
    for _ in range(steps):
        codes, values = by_hand(w - update)
        update = leading(w - values, rank)
    np.testing.assert_array_equal(codes_of(params["w"]), codes)
    lora = adapters["w"]
    np.testing.assert_allclose(3 * lora.a @ lora.b, update, atol=1e-5)
    gram = np.sum(lora.a**2, 0), np.sum(lora.b**2, 1)
    np.testing.assert_allclose(*gram, rtol=1e-4)  # balanced


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_codes_of_peft(steps):
    pytest.importorskip("bitsandbytes", reason="needs the golden extra")
    torch = pytest.importorskip("torch", reason="needs the golden extra")
    pytest.importorskip("peft", reason="needs the golden extra")
    from peft.utils import loftq_utils

    source = inspect.getsource(loftq_utils.loftq_init)
    dense = "dequantized_weight.to(device=device, dtype=dtype)"
    assert 'else "cuda"' in source and f"return {dense}" in source
    source = source.replace('else "cuda"', 'else "cpu"')  # its only device
    source = source.replace(dense, "qweight")
    theirs = dict(vars(loftq_utils))
    exec(source, theirs)
    weight = torch.tensor(0.02 * normal(96, 128))
    packed, a, b = theirs["loftq_init"](weight, 4, 8, steps)
    flat = packed.data.numpy().ravel()
    codes = np.stack([flat >> 4, flat & 15], 1).reshape(96, 128)

    dense = {"w": jnp.asarray(weight.numpy().T)}
    adapters, params = lorax.init(KEY, dense, lorax.Target("w", rank=8))
    adapters, params = lorax.loftq(adapters, params, [("w", SINGLE)], steps=steps)
    np.testing.assert_array_equal(codes_of(params["w"]), codes.T)
    update = adapters["w"].scale * adapters["w"].a @ adapters["w"].b
    theirs = (b @ a).numpy().T
    np.testing.assert_allclose(update, theirs, atol=1e-4 * np.abs(theirs).max())


PATHS = "layers/(up|gate)/kernel"  # one shape, for one program


@needs_data
def test_less_is_lost_of_a_real_model():
    """On kernels of stories260k, in NF4."""
    model, dense = hf.load(DATA / "stories260k")
    run = lambda params, x: model.apply({"params": params}, x)
    kernels = lorax.discover(run, dense, jnp.zeros((1, 8), jnp.int32))
    rules = [(PATHS, "nf4")]

    def lost(init, rank, steps):
        target = lorax.Target(PATHS, rank, init=init)
        given = lorax.init(KEY, dense, target, kernels)
        if not steps:
            return error(given[0], lorax.quantize(given[1], rules, kernels), dense)
        return error(*lorax.loftq(*given, rules, kernels, steps=steps), dense)

    plain, narrower = lost("standard", 8, 0), lost("pissa", 8, 0)
    once, often, wide = (lost("standard", *of) for of in ((8, 1), (8, 5), (16, 5)))
    principal = lost("pissa", 8, 5)
    figures = plain, once, often, wide, narrower, principal
    print("plain, 1, 5, rank 16, PiSSA, 5:", *(f"{x:.4f}" for x in figures))
    assert wide < often < once < plain
    assert principal < narrower < plain
    assert often < 0.75 * plain and principal < 0.75 * plain


def test_layers_and_experts_by_themselves():
    """A stack axis in the middle, heads in and out, bfloat16, and one layer without."""
    kernel = jnp.asarray(normal(2, 3, 32, 4, 6)).astype(jnp.bfloat16)
    axes = lorax.Axes((0, 2), (3, 4), (1,))
    a, b = jnp.zeros((2, 2, 32, 5)), jnp.ones((2, 5, 4, 6))
    adapter = lorax.Lora(a, b, 0.5, axes, layers=(0, 2))
    kernels = {"w": lorax.Kernel("w", kernel.shape, kernel.dtype, "dot", axes)}
    rules = [("w", Int4(group=32))]
    adapters, params = lorax.loftq({"w": adapter}, {"w": kernel}, rules, kernels)
    assert params["w"].dtype == jnp.bfloat16 and adapters["w"].a.shape == a.shape
    alone = lorax.Lora(a[0], b[0], 0.5, lorax.Axes((0, 1), (2, 3)))
    inner = lorax.Axes((0, 1), (2, 3))
    for held, layer in enumerate((0, 2)):
        one = {"w": kernel[:, layer]}
        told = {"w": lorax.Kernel("w", one["w"].shape, kernel.dtype, "dot", inner)}
        own, packed = lorax.loftq({"w": alone}, one, rules, told)
        layers = params["w"].layer(layer)
        np.testing.assert_array_equal(layers.codes, packed["w"].codes)
        product = lambda f: np.einsum("hkr,rij->hkij", f.a, f.b)
        found = jax.tree.map(lambda x, held=held: x[held], adapters["w"])
        np.testing.assert_allclose(product(found), product(own["w"]), atol=1e-5)
    plain = lorax.quantize({"w": kernel}, rules, kernels)["w"]
    np.testing.assert_array_equal(params["w"].layer(1).codes, plain.layer(1).codes)


def test_the_fit_sees_the_kernel_as_it_is_decoded():
    """In bfloat16 the codes decode to rounded values, and the factors absorb that."""
    dense = {"w": jnp.asarray(normal(64, 64)).astype(jnp.bfloat16)}
    given = lorax.init(KEY, dense, lorax.Target("w", rank=64))
    adapters, params = lorax.loftq(*given, [("w", "nf4")], steps=1)
    base = np.asarray(dequantize(params["w"]), np.float64)
    lora = adapters["w"]
    exact = base + lora.scale * np.asarray(lora.a @ lora.b, np.float64)
    np.testing.assert_allclose(exact, dense["w"], atol=1e-5)


def test_three_factors_and_a_base_with_frozen_arrays():
    dense = {"w": jnp.asarray(normal(128, 32)), "v": jnp.asarray(normal(64, 32))}
    targets = [
        lorax.Target("w", rank=4, adapter="adalora"),
        lorax.Target("v", rank=4, adapter="vera"),
    ]
    given = lorax.init(KEY, dense, targets)
    adapters, base = lorax.loftq(*given, [("w", "nf4")])
    assert isinstance(base, lorax.Base) and base.params["v"] is dense["v"]
    assert adapters["v"] is given[0]["v"]
    plain = lorax.quantize(dense, [("w", "nf4")])["w"]
    off = lambda w: float(jnp.linalg.norm(w - dense["w"]))
    merged = lorax.merge(adapters, base)["w"]
    assert off(merged) < 0.8 * off(dequantize(plain))
    assert adapters["w"].moved_by.startswith("loftq(NF4(block=64, double=True), steps=")


def test_leaves_without_adapters_are_quantised_alone():
    dense = {"w": jnp.asarray(normal(128, 32)), "v": jnp.asarray(normal(64, 32))}
    given = lorax.init(KEY, dense, lorax.Target("w", rank=4))
    _, params = lorax.loftq(*given, [(".*", "int8")])
    plain = lorax.quantize(dense, [(".*", "int8")])
    jax.tree.map(np.testing.assert_array_equal, params["v"], plain["v"])


def test_errors():
    dense = {"w": jnp.asarray(normal(64, 32)), "v": jnp.asarray(normal(64, 32))}
    given = lorax.init(KEY, dense, lorax.Target("w", rank=4))
    rules = [("w", "nf4")]
    for steps in (0, 2.0, True):
        with pytest.raises(ValueError, match="steps=.*whole number >= 1.*quantize"):
            lorax.loftq(*given, rules, steps=steps)
    with pytest.raises(ValueError, match="quantise .'v'.*on .'w'.*lorax.quantize"):
        lorax.loftq(*given, [("v", "nf4")])
    dora = lorax.init(KEY, dense, lorax.Target("w", rank=4, adapter="dora"))
    with pytest.raises(ValueError, match="w: the update of Dora is not a product"):
        lorax.loftq(*dora, rules)
    with pytest.raises(ValueError, match="w: the leaf is already quantised"):
        lorax.loftq(given[0], lorax.quantize(dense, rules), rules)
    with pytest.raises(ValueError, match="w: groups of 48 inputs do not divide"):
        lorax.loftq(*given, [("w", Int8(group=48))])
    for init, start in {"loftq": "standard", "qpissa": "pissa"}.items():
        with pytest.raises(ValueError, match=f"init='{init}' needs.*'{start}'.*loftq"):
            lorax.init(KEY, dense, lorax.Target("w", rank=4, init=init))
