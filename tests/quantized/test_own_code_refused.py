"""Where an adapter cannot sit beside a kernel of codes, an error says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import lorax
from lorax import checkpoint
from tests.programs import normal
from tests.quantized import own_code
from tests.quantized.own_code import DEPTH, IN, OUT, codes, ready, scales
from tests.quantized.test_adapt import close
from tests.quantized.test_own_code import KEY, TARGET, started


def dynamic(p, x):
    """int8 x int8, as in MaxText and AQT, with scales from the current tokens."""
    own = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    rounded = jnp.round(x / own).astype(jnp.int8)
    y = jax.lax.dot(rounded, p["q"], preferred_element_type=jnp.int32)
    return y.astype(x.dtype) * own * p["s"]


def unrolled(p, x):
    for i in range(2):
        x = x @ (p["stack"][i].astype(x.dtype) * p["s"])
    return x


def looked_up_too(p, x):
    table = p["q"].astype(x.dtype) * p["s"]
    return p["q"][x[:, 0].astype(jnp.int32) % IN].astype(x.dtype) @ table


REFUSED = {
    "dynamic": (
        dynamic,
        "multiplies integers by integers: the activation is quantised",
    ),
    "unscaled": (
        lambda p, x: jnp.tanh(x @ p["q"].astype(x.dtype)) * p["s"],
        "multiplies by unscaled codes, and no scale follows directly",
    ),
    "mixed": (
        lambda p, x: jax.lax.dot(x, p["f"], preferred_element_type=x.dtype),
        "multiplies by float8_e4m3fn; cast the kernel",
    ),
    "two scales": (
        lambda p, x: (
            x @ p["q"].astype(x.dtype) * p["s"]
            + (x + 1) @ p["q"].astype(x.dtype) * p["t"]
        ),
        "it stands for two different kernels",
    ),
    "unrolled": (unrolled, "it stands for two different kernels"),
    "looked up too": (looked_up_too, "'gather' at .* is not linear in it"),
    "alike": (
        lambda p, x: x @ ((p["q"] * 16 + p["low"]).astype(x.dtype) * p["s"]),
        "a kernel made of low and q alike; name the kernel",
    ),
    "two kernels": (
        lambda p, x: (
            x
            @ ((p["q"].astype(x.dtype) * p["s"]) @ (p["low"].astype(x.dtype) * p["t"]))
        ),
        "multiplies two kernels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_beside_it_is_refused_by_name(name):
    fn, says = REFUSED[name]
    q = codes(1, 2, IN, IN).astype(np.int8)
    params = ready(q=q[0], low=q[1], stack=q, s=scales(2, IN), t=scales(3, IN))
    params["f"] = normal(4, IN, IN).astype(jnp.float8_e4m3fn)
    x = normal(0, 3, IN)
    kernels = lorax.discover(fn, params, x)
    (path,) = {p for p, k in kernels.items() if k.refused} - {"low"}
    with pytest.raises(ValueError, match=f"{path}: .*{says}"):
        lorax.init(KEY, params, [lorax.Target(path, rank=2)], kernels)
    shape = kernels[path].shape
    leaf = {path: jnp.zeros(shape)}
    axes = None if len(shape) == 2 else (0,)
    target = lorax.Target(path, rank=2, batch_axes=axes)
    adapters, _ = lorax.init(KEY, leaf, [target])
    with pytest.raises(ValueError, match=f"{path}: .*{says}"):
        lorax.adapt(fn)(adapters, params, x)


def test_all_linear_says_what_it_cannot_take():
    q, s = codes(1, IN, IN), scales(2, IN)
    params = ready(q=q.astype(np.int8), s=s, v=normal(3, IN, IN), w=normal(4, IN, 5))
    fn = lambda p, x: jnp.tanh(dynamic(p, x) @ p["v"]) @ p["w"]
    kernels = lorax.discover(fn, params, normal(0, 3, IN))
    with pytest.warns(lorax.TargetWarning, match="q .*: .* integers by integers"):
        adapters, _ = lorax.init(KEY, params, [lorax.Target("all-linear", 2)], kernels)
    assert [*adapters] == ["v"]


def test_an_embedding_of_integers_is_left_alone():
    params = ready(
        table=codes(1, 9, IN).astype(np.int8),
        s=scales(2, 9),
        q=codes(3, IN, IN).astype(np.int8),
        t=scales(4, IN),
        head=normal(5, IN, 5),
    )

    def fn(p, ids):
        x = p["table"][ids].astype(jnp.float32) * p["s"][ids, None]
        return jnp.tanh(x @ (p["q"].astype(x.dtype) * p["t"])) @ p["head"]

    kernels = lorax.discover(fn, params, jnp.arange(4))
    adapters, _ = lorax.init(KEY, params, [lorax.Target("all-linear", 2)], kernels)
    assert [*adapters] == ["q"]
    with pytest.raises(ValueError, match="table: matched by 'table', but its dtype is"):
        lorax.init(KEY, params, [lorax.Target("table", 2)], kernels)


def test_verbs_that_need_the_kernel_say_so(tmp_path):
    model = own_code.MODELS["int8_before"]()
    adapters, params, kernels = started(model)
    start = lambda **fields: lorax.init(
        KEY, params, [lorax.Target(".*q", rank=2, **fields)], kernels
    )
    with pytest.raises(ValueError, match="layer/q: .* its codes cannot hold an update"):
        lorax.merge(adapters, params)
    with pytest.raises(ValueError, match="layer/q: init='pissa' reads the kernel"):
        start(init="pissa")
    with pytest.raises(
        ValueError, match="layer/q: adapter='dora' needs the kernel its"
    ):
        start(adapter="dora")
    with pytest.raises(
        ValueError, match="layer/q: adapter='full' needs the kernel its"
    ):
        start(adapter="full")
    with pytest.raises(
        ValueError, match="layer/q: adapter='lora_xs' or its init reads"
    ):
        start(adapter="lora_xs")
    with pytest.raises(ValueError, match="pass kernels=lorax.discover"):
        lorax.init(KEY, params, [TARGET])
    other = lorax.init(KEY, {"layer/q": jnp.ones((IN, OUT + 1))}, [TARGET])[0]
    with pytest.raises(ValueError, match="layer/q: the factors have shapes"):
        lorax.adapt(model.fn)(other, params, model.x)
    dense = {"layer/q": jnp.ones((IN, OUT))}
    norms, _ = lorax.init(KEY, dense, [lorax.Target(".*q", adapter="dora")])
    with pytest.raises(
        ValueError, match="layer/q: Dora reads the values of the kernel"
    ):
        lorax.adapt(model.fn)(norms, params, model.x)
    with pytest.raises(KeyError, match="has no leaf 'layer/k'; nearest"):
        lorax.adapt(model.fn)({"layer/k": other["layer/q"]}, params, model.x)
    short = {**params, "layer": {**params["layer"], "q": jnp.ones((4, 4), jnp.int8)}}
    with pytest.raises(
        ValueError, match="layer/q: the leaf is int8.4, 4., but discover"
    ):
        lorax.init(KEY, short, [TARGET], kernels)
    with pytest.raises(
        ValueError, match="layer/q: the program computes this kernel from lay"
    ):
        lorax.quantize(params, [(".*q", "int8")], kernels)
    with pytest.raises(
        ValueError, match="layer/q: the program computes this kernel, so"
    ):
        lorax.compose.extract(params, params, [TARGET], kernels)
    checkpoint.save_adapters(tmp_path, adapters, params=params)
    close(checkpoint.load_adapters(tmp_path, params=params), adapters)
    assert lorax.analysis.cost(adapters, params, kernels).adapters.flops > 0


def test_an_adapter_without_a_form_is_refused():
    model = own_code.MODELS["int8_after"]()
    whole = lorax.Target(".*q", rank=2, adapter="randlora")
    adapters, base, _ = started(model, whole)
    with pytest.raises(
        ValueError, match="layer/q: RandLora has no form for a linear op"
    ):
        lorax.adapt(model.fn)(adapters, base, model.x)


def test_a_stack_that_a_loop_indexes_is_refused():
    q, s = codes(1, DEPTH, IN, IN), scales(2, DEPTH, IN)
    params = ready(q=q.astype(np.int8), s=s.astype(np.float32))
    x = normal(0, 3, IN)

    def fn(p, x):
        step = lambda i, x: jnp.tanh(x @ (p["q"][i].astype(x.dtype) * p["s"][i]))
        return jax.lax.fori_loop(0, DEPTH, step, x)

    kernels = lorax.discover(fn, params, x)
    with pytest.raises(
        ValueError, match="q: .*a loop's counter is not .*: scan over the st"
    ):
        lorax.init(KEY, params, [TARGET], kernels)
    stack = {"q": jnp.ones((DEPTH, IN, IN))}
    target = lorax.Target("q", rank=2, batch_axes=(0,))
    adapters, _ = lorax.init(KEY, stack, [target])
    with pytest.raises(
        ValueError, match="q: 'dynamic_slice' at .* is not linear in it"
    ):
        lorax.adapt(fn)(adapters, params, x)


def test_quantize_leaves_alone_what_is_quantised():
    model = own_code.MODELS["int8_before"]()
    params = model.params | {"more": normal(1, 64, IN)}
    fn = lambda p, x: model.fn(p, jnp.tanh(x @ p["more"]))
    kernels = lorax.discover(fn, params, normal(0, 3, 64))
    base = lorax.quantize(params, "nf4", kernels)
    assert lorax.quantized.is_quantized(base["more"])
    assert base["layer"]["q"] is params["layer"]["q"]


def test_inside_shard_map_it_is_not_followed():
    q, s = codes(1, IN, IN), scales(2, IN)
    params = ready(q=q.astype(np.int8), s=s.astype(np.float32))
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    cut = PartitionSpec(None, "tensor")
    fn = lambda p, x: jax.shard_map(
        lambda x, q, s: x @ (q.astype(x.dtype) * s),
        mesh=mesh,
        in_specs=(PartitionSpec(), cut, PartitionSpec("tensor")),
        out_specs=cut,
    )(x, p["q"], p["s"])
    kernels = lorax.discover(fn, params, normal(0, 3, IN))
    with pytest.raises(ValueError, match="q: .*shard_map .* are not followed"):
        lorax.init(KEY, params, [TARGET], kernels)


def test_a_scale_that_follows_leaves_nothing_to_merge():
    q, s = codes(1, IN, IN), scales(2, IN)
    params = ready(q=q.astype(np.int8), s=s.astype(np.float32))
    fn = lambda p, x: (x[:, :8] @ p["q"].astype(x.dtype)[:8]) * p["s"]
    x = normal(0, 3, IN)
    kernels = lorax.discover(fn, params, x)
    target = lorax.Target("q", rank=2, adapter="lokr")  # needs whole inputs
    adapters, _ = lorax.init(KEY, params, [target], kernels)
    with pytest.raises(
        ValueError, match="q: the scale of its codes follows the produc"
    ):
        lorax.adapt(fn)(adapters, params, x)
