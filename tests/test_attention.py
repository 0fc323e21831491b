"""Every implementation of attention against numpy in float64, gradients included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import attention, sharding
from lorax.attention import lean, machine, tiles
from lorax.attention.rule import Given, Rule
from lorax.models import llama

B, T, HEADS, KV, DIM = 2, 128, 4, 2, 16

SEGMENTS = np.repeat([[0, 1, 2], [0, 0, 1]], [50, 40, 38], axis=1)
REAL = np.arange(T) < np.array([[T], [100]])
CASES = {
    "every head its own keys": {"causal": True, "kv": HEADS},
    "grouped heads": {"causal": True},
    "window": {"causal": True, "window": 30},
    "soft cap": {"causal": True, "soft_cap": 1.5},
    "segments": {"causal": True, "segments": SEGMENTS},
    "padding": {"causal": True, "real": REAL},
    "encoder": {"real": REAL, "scale": 0.3},
    "all": {
        "causal": True,
        "window": 30,
        "soft_cap": 1.5,
        "segments": SEGMENTS,
        "real": REAL,
        "scale": 0.3,
    },
}
MORE = [case for case in CASES if case not in ("encoder", "all")]


@functools.cache
def inputs(kv=KV, dtype="float32"):
    """q, k, v, and what the loss multiplies the result by."""
    rng = np.random.default_rng(0)
    shapes = [(B, T, n, DIM) for n in (HEADS, kv, kv, HEADS)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def reference(q, k, v, c, *, causal=False, window=None, soft_cap=None, **more):
    """The result, and the gradients of its product with c, in float64."""
    q, k, v, c = (np.asarray(x, np.float64) for x in (q, k, v, c))
    shared = q.shape[2] // k.shape[2]
    wide_k, wide_v = (np.repeat(x, shared, axis=2) for x in (k, v))
    scale = more.get("scale") or DIM**-0.5
    scores = scale * np.einsum("bthd,bshd->bhts", q, wide_k)
    slope = np.ones_like(scores)
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
        slope = 1 - (scores / soft_cap) ** 2
    back = np.arange(T)[:, None] - np.arange(T)
    seen = np.ones((B, T, T), bool)
    if causal:
        seen &= back >= 0
    if window:
        seen &= back < window
    if "segments" in more:
        seen &= more["segments"][:, :, None] == more["segments"][:, None]
    if "real" in more:  # what padding itself attends to does not matter
        seen &= more["real"][:, None] | ~more["real"][:, :, None]
    scores = np.where(seen[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshd->bthd", p, wide_v)
    dp = np.einsum("bthd,bshd->bhts", c, wide_v)
    ds = scale * slope * p * (dp - (dp * p).sum(-1, keepdims=True))
    dq = np.einsum("bhts,bshd->bthd", ds, wide_k)
    dk = np.einsum("bhts,bthd->bshd", ds, q)
    dv = np.einsum("bhts,bthd->bshd", p, c)
    dk, dv = (x.reshape(B, T, -1, shared, DIM).sum(3) for x in (dk, dv))
    return out, dq, dk, dv


def agrees(name, case, dtype, tolerance):
    options = dict(CASES[case])
    q, k, v, c = inputs(options.pop("kv", KV), dtype)
    real = options.get("real", np.ones((B, T), bool))
    c = jnp.where(real[..., None, None], c, 0)
    want = reference(q, k, v, c, **options)
    segments = attention.segments_of(options.pop("real", None), options.get("segments"))
    options["segments"] = segments

    def loss(q, k, v):
        out = attention.attend(q, k, v, implementation=name, **options)
        return (out * c).sum(dtype=jnp.float32), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, out), grads = run(q, k, v)
    assert out.dtype == q.dtype
    for x, y in zip((out, *grads), want, strict=True):
        keep = real if x is out else True
        apart = np.linalg.norm(np.where(np.array(keep)[..., None, None], x - y, 0))
        assert apart < tolerance * np.linalg.norm(y), (name, case, x.shape)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["plain", "lean", "tiles"])
def test_attention_is_its_definition(name, case, monkeypatch):
    if name == "tiles" and case == "encoder":
        pytest.skip("tiles are causal")
    monkeypatch.setattr(lean, "CHUNK", 48)  # does not divide the time
    monkeypatch.setattr(tiles, "TILE", 32)
    agrees(name, case, "float32", 2e-6)


@pytest.mark.parametrize(
    "case",
    ["encoder", "all", *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)],
)
def test_splash_is_its_definition(case):
    agrees("splash", case, "float32", 2e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is of NVIDIA's GPUs")
@pytest.mark.parametrize("case", [c for c in CASES if "soft_cap" not in CASES[c]])
def test_cudnn_is_its_definition(case):
    agrees("cudnn", case, "bfloat16", 1e-2)


@pytest.mark.parametrize("name", ["plain", "lean"])
def test_masks_and_biases(name, monkeypatch):
    monkeypatch.setattr(lean, "CHUNK", 48)
    q, k, v, c = inputs()
    rng = np.random.default_rng(1)
    bias = jnp.asarray(rng.normal(size=(1, HEADS, T, T)), jnp.float32)
    mask = np.array(rng.random((B, 1, T, T)) < 0.5) | np.eye(T, dtype=bool)

    def loss(bias):
        out = attention.attend(q, k, v, mask=mask, bias=bias, implementation=name)
        return (out * c).sum()

    got, slope = jax.jit(jax.value_and_grad(loss))(bias)
    wide = [np.repeat(np.asarray(x, np.float64), 2, axis=2) for x in (k, v)]
    scores = np.einsum("bthd,bshd->bhts", q, wide[0]) / 4 + np.asarray(bias)
    p = np.exp(np.where(mask, scores, -np.inf))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthd,bshd->bhts", c, wide[1])
    ds = p * (dp - (dp * p).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, (p * dp).sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, ds.sum(0, keepdims=True), atol=2e-6)


RULE = Rule(0.25, causal=True)


@pytest.mark.parametrize(
    ("platform", "dtype", "rule", "given", "want"),
    [
        ("cpu", "bfloat16", RULE, Given(), "tiles"),
        ("cpu", "float32", RULE._replace(causal=False), Given(), "lean"),
        ("tpu", "bfloat16", RULE, Given(), "splash"),
        ("tpu", "float32", RULE, Given(segments=SEGMENTS), "splash"),
        ("tpu", "float32", RULE, Given(mask=np.ones((T, T), bool)), "lean"),
        ("gpu", "bfloat16", RULE, Given(), "cudnn"),
        ("gpu", "float32", RULE, Given(), "tiles"),
        ("gpu", "bfloat16", RULE._replace(soft_cap=30.0), Given(), "tiles"),
    ],
)
def test_flash_is_what_suits_the_machine(
    platform, dtype, rule, given, want, monkeypatch
):
    monkeypatch.setattr(machine, "platform", lambda: platform)
    q, k, *_ = inputs(dtype=dtype)
    assert attention.chosen(q, k, rule, given) == want


def test_the_platform_is_that_of_the_mesh():
    with jax.set_mesh(sharding.make_mesh(data=-1, fsdp=1)):
        assert machine.platform() == jax.devices()[0].platform


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "fast"}, "'fast': unknown; choose one of flash, plain"),
        ({"window": 3}, "window=3 with causal=False: .* set causal=True"),
        ({"causal": True, "window": 0}, "a window must be at least 1"),
        ({"implementation": "cudnn"}, "'cudnn': it computes in bfloat16 or float16"),
        (
            {"implementation": "splash", "bias": jnp.ones((1, 1, T, T))},
            "'splash': it supports segments, .* no mask and no bias; use 'lean'",
        ),
    ],
)
def test_what_attention_refuses(options, message):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=message):
        attention.attend(q, k, v, **options)


def test_shapes_that_attention_refuses():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        attention.attend(q, jnp.ones((B, T, 3, DIM)), v)
    with pytest.raises(ValueError, match="segments of 128 keys and 64 queries"):
        attention.attend(q[:, :64], k, v, segments=SEGMENTS)
    with pytest.raises(ValueError, match="multiple of 128 queries, not 64"):
        attention.attend(q[:, :64], k, v, causal=True, implementation="splash")
    config = llama.Config(vocabulary=8, width=8, layers=1, heads=2, kv_heads=2)
    with pytest.raises(ValueError, match="'fast'; choose one of flash, plain, lean"):
        dataclasses.replace(config, attention="fast")


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(("kv", "own"), [(2, 1), (1, 1)])
def test_every_device_takes_its_rows_and_heads(kv, own):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    q = jax.ShapeDtypeStruct((8, T, HEADS, DIM), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((8, T, kv, DIM), jnp.bfloat16)
    run = functools.partial(attention.attend, causal=True, implementation="splash")
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(run)(q, k, k))
    assert f"bf16[2,2,{T},{DIM}]" in text and f"bf16[2,{own},{T},{DIM}]" in text


@pytest.mark.parametrize(
    "windows",
    [(20, 0), *(pytest.param(w, marks=pytest.mark.slow) for w in [(), (20, 20)])],
)
def test_a_model_with_flash_is_the_plain_one(windows, monkeypatch):
    monkeypatch.setattr(lean, "CHUNK", 32)
    sizes = {"width": 8, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 4}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 8, (2, 48)), jnp.int32)
    segments = jnp.asarray(np.arange(48)[None] // [[15], [48]], jnp.int32)
    found = {}
    for name in ("plain", "flash"):
        config = llama.Config(
            vocabulary=8, hidden=8, attention=name, windows=windows, **sizes
        )
        model = llama.Model(config)
        params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        params = jax.tree.map(lambda x: 20 * x if x.ndim > 2 else x, params)

        def loss_fn(params, tokens, model=model):
            logits = model.apply({"params": params}, tokens, segments=segments)
            return (logits**2).sum()

        kernels = lorax.discover(loss_fn, params, tokens)
        assert [path for path, k in kernels.items() if k.head] == ["head/kernel"]
        kinds = {path: (k.op, k.axes) for path, k in kernels.items()}
        found[name] = kinds, jax.jit(jax.value_and_grad(loss_fn))(params, tokens)
    (plain_kinds, plain), (flash_kinds, flash) = found["plain"], found["flash"]
    assert flash_kinds == plain_kinds
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, plain, flash)
