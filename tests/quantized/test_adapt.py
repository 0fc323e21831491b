"""A quantised base under adapt: equal to its dense copy, and nothing dense is kept."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import lorax
from lorax import checkpoint, sharding, training
from lorax.quantized import NF4, Int4, Int8, Quantized, is_quantized
from tests import programs, programs_nnx  # noqa: F401 (it registers its own)

KEY = jax.random.key(0)
FORMS = ["dora", "lokr", "oft", "randlora"]  # a gain, a branch, a map of inputs, merged
OTHERS = sorted({*lorax.adapters.REGISTRY} - {"full", "sliced_lora", *FORMS})


@jax.jit
def dense(params):
    return jax.tree.map(jnp.asarray, params, is_leaf=is_quantized)


def close(got, want, tolerance=1e-5):
    """Relative to the norm of the whole tree."""
    got, want = (
        [np.asarray(v, np.float64) for v in jax.tree.leaves(tree)]
        for tree in (got, want)
    )
    norm = np.sqrt(sum(np.sum(w**2) for w in want))
    for g, w in zip(got, want, strict=True):
        assert np.max(np.abs(g - w), initial=0) <= tolerance * norm


def packed(params, kernels, paths, form):
    """The tree with these leaves quantised, embeddings included."""
    leaves = lorax.tree.flatten(params)
    make = jax.jit(form.quantize, static_argnums=1)
    return lorax.tree.replace(
        params, {p: make(leaves[p], kernels[p].linear_axes()) for p in paths}
    )


@pytest.mark.once
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_every_program_runs_on_a_quantised_base_as_on_its_dense_copy(name):
    program = programs.PROGRAMS[name]()
    fn, args = program.fn, program.args
    kernels = lorax.discover(fn, program.params, *args)
    make = jax.jit(lambda p: lorax.init(KEY, p, program.targets, kernels)[0])
    adapters = programs.perturbed(make(program.params))
    linear = [path for path, kernel in kernels.items() if kernel.axes is not None]
    base = packed(program.params, kernels, linear, Int8())
    decoded = name == "scaled_by_vectors"  # a vector per layer, before a scan
    adapted = lorax.adapt(fn, on_merge="warn" if decoded else "error")
    told = pytest.warns(lorax.MergeWarning, match="w2: 'scan'.*reads all of a quanti")
    with told if decoded else contextlib.nullcontext():
        jax.eval_shape(adapted, adapters, base, *args)
    got = programs.loss_and_grad(adapted, adapters, base, *args)
    want = programs.loss_and_grad(adapted, adapters, dense(base), *args)
    close(got, want)
    close(jax.jit(adapted)({}, base, *args), jax.jit(fn)(dense(base), *args))
    again = lorax.discover(fn, base, *args)
    assert {p: (k.op, k.axes) for p, k in again.items()} == {
        p: (k.op, k.axes) for p, k in kernels.items()
    }


def layers(seed=0, dtype=jnp.float32):
    """Two kernels in each of three layers, and a head; and a loss on them."""
    draw = lambda i, *shape: (0.1 * programs.normal(seed + i, *shape)).astype(dtype)
    params = {
        "up": draw(0, 3, 64, 128),
        "down": draw(1, 3, 128, 64),
        "bias": draw(2, 3, 128),
        "head": draw(3, 64, 32),
    }

    def loss(params, x):
        def body(x, layer):
            h = jnp.tanh(x @ layer["up"] + layer["bias"])
            return x + h @ layer["down"], None

        stack = {name: params[name] for name in ("up", "down", "bias")}
        x, _ = jax.lax.scan(jax.checkpoint(body), x, stack)
        return jnp.sum(jnp.square(x @ params["head"]).astype(jnp.float32))

    x = programs.normal(9, 4, 64).astype(dtype)
    return loss, params, x, lorax.discover(loss, params, x)


RULES = [("up|down", "nf4"), ("head", Int4(group=32, symmetric=False))]
TARGETS = [lorax.Target("up|down|head", rank=4)]


@pytest.mark.parametrize(
    "adapter", [*FORMS, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
@pytest.mark.filterwarnings("ignore::lorax.MergeWarning")
def test_every_parametrisation(adapter):
    loss, params, x, kernels = layers()
    base = lorax.quantize(params, RULES, kernels)
    target = lorax.Target("up|down|head", rank=4, adapter=adapter)
    adapters, base = lorax.init(KEY, base, [target], kernels)
    adapters = programs.perturbed(adapters)
    run = jax.jit(jax.value_and_grad(lorax.adapt(loss)))
    plain, frozen = lorax.tree.split(base)
    copy = lorax.Base(dense(plain), frozen) if frozen else dense(plain)
    got, want = run(adapters, base, x), run(adapters, copy, x)
    close(got, want)
    merged = jax.jit(lorax.merge)(adapters, base)  # eager mode compiles every line
    assert not any(map(is_quantized, jax.tree.leaves(merged, is_leaf=is_quantized)))
    close(loss(merged, x), want[0])


@pytest.mark.parametrize("vmapped", ["examples", "members"])
def test_under_vmap(vmapped):
    loss, params, x, kernels = layers()
    base = lorax.quantize(params, RULES, kernels)
    adapters = programs.perturbed(lorax.init(KEY, base, TARGETS, kernels)[0])
    grad = jax.grad(lorax.adapt(loss))
    if vmapped == "examples":
        run = lambda base: jax.vmap(grad, (None, None, 0))(adapters, base, x[:, None])
    else:
        two = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), adapters)
        run = lambda base: jax.vmap(grad, (0, None, None))(two, base, x)
    close(jax.jit(run)(base), jax.jit(run)(dense(base)))


def test_a_layer_taken_by_index_and_a_loop_of_kernels():
    kernel = programs.normal(0, 3, 64, 64)

    def loss(params, x):
        step = lambda i, x: jnp.tanh(x @ params["w"][i])
        x = jax.lax.fori_loop(0, 3, step, x)
        return jnp.sum(x @ jnp.concatenate([params["w"][0], params["w"][1].T], 1))

    x = programs.normal(1, 4, 64)
    kernels = lorax.discover(loss, {"w": kernel}, x)
    base = lorax.quantize({"w": kernel}, [("w", NF4())], kernels)
    close(lorax.adapt(loss)({}, base, x), loss(dense(base), x))
    adapters, _ = lorax.init(KEY, base, [("w", 2)], kernels)
    adapters = programs.perturbed(adapters)
    adapted = lorax.adapt(loss)
    close(adapted(adapters, base, x), loss(lorax.merge(adapters, base), x))


def test_a_custom_rule_gets_the_dense_kernel():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    loss = lambda params, x: jnp.sum(product(x, params["w"]) ** 2)
    x = programs.normal(1, 4, 64)
    base = lorax.quantize({"w": programs.normal(0, 64, 8)}, [("w", "int8")])
    close(lorax.adapt(loss)({}, base, x), loss(dense(base), x))
    adapters = programs.perturbed(lorax.init(KEY, base, [("w", 2)])[0])
    adapted = lorax.adapt(loss, custom_rules="branch")
    close(
        jax.value_and_grad(adapted)(adapters, base, x),
        jax.value_and_grad(adapted)(adapters, dense(base), x),
    )


@pytest.mark.parametrize("form", ["nf4", "int8", Int4(group=32, symmetric=False)])
def test_in_shard_map(form):
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "tensor")

    def loss(params, x):
        def run(x, w, v):
            return jax.lax.psum(jnp.tanh(x @ w) @ v, "tensor")

        sharded = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(PartitionSpec(), spec, PartitionSpec("tensor")),
            out_specs=PartitionSpec(),
        )
        return jnp.sum(sharded(x, params["w"], params["v"]) ** 2)

    params = {"w": programs.normal(0, 64, 128), "v": programs.normal(1, 128, 64)}
    x = programs.normal(2, 4, 64)
    kernels = lorax.discover(loss, params, x)
    base = lorax.quantize(params, [("w|v", form)], kernels)
    adapters = programs.perturbed(lorax.init(KEY, base, [("w|v", 2)], kernels)[0])
    run = jax.jit(jax.value_and_grad(lorax.adapt(loss)))
    close(run(adapters, base, x), run(adapters, dense(base), x))


def test_a_base_that_is_spread_over_devices():
    loss, params, x, kernels = layers()
    base = lorax.quantize(params, RULES, kernels)
    adapters = programs.perturbed(lorax.init(KEY, base, TARGETS, kernels)[0])
    mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    rules = [
        ("up", PartitionSpec(None, "fsdp", "tensor")),
        ("down", PartitionSpec(None, "tensor", "fsdp")),
        (".*", PartitionSpec()),
    ]
    placed = sharding.place(base, mesh, rules=rules)
    spread = jax.device_put(base, placed.tree(base))
    assert spread["up"].codes.addressable_shards[0].data.shape == (3, 16, 64)
    assert placed.abstract(base)["up"].shape == (3, 64, 128)
    run = jax.jit(jax.value_and_grad(lorax.adapt(loss)))
    close(run(adapters, spread, x), run(adapters, base, x))


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_on_an_explicit_mesh(form):
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2
    )
    params = {
        "up": 0.1 * programs.normal(0, 3, 64, 128),
        "down": 0.1 * programs.normal(1, 3, 128, 64),
    }

    def loss(params, x, spec=None):
        def body(x, layer):
            h = jnp.tanh(x @ layer["up"])
            down = jnp.einsum("bh,hd->bd", h, layer["down"], out_sharding=spec)
            return x + down, None

        return jnp.sum(jax.lax.scan(body, x, params)[0] ** 2)

    x = programs.normal(2, 4, 64)
    kernels = lorax.discover(loss, params, x)
    base = lorax.quantize(params, [("up|down", form)], kernels)
    adapters = programs.perturbed(lorax.init(KEY, base, [("up|down", 4)], kernels)[0])
    want = jax.value_and_grad(lorax.adapt(loss))(adapters, base, x)
    cut = {"up": (None, None, "tensor"), "down": (None, "tensor", None)}
    place = lambda spec: jax.sharding.NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        lies = {name: leaf.specs(cut[name]) for name, leaf in base.items()}
        lies = jax.tree.map(place, lies)
        spread = jax.device_put(base, lies)
        rows = PartitionSpec("data", None)
        adapted = lorax.adapt(lambda params, x: loss(params, x, rows))
        run = jax.jit(jax.value_and_grad(adapted))
        close(run(adapters, spread, jax.device_put(x, place(rows))), want)


def memory(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis()


@pytest.mark.parametrize("form, most", [("nf4", 0.54), ("int4", 0.6), ("int8", 1.03)])
def test_a_stack_is_never_dense(form, most):
    """Argument bytes per weight; temporaries of a gradient step, in dense layers."""
    depth, width, hidden = 32, 1024, 3584
    shapes = {
        "up": jax.ShapeDtypeStruct((depth, width, hidden), jnp.float32),
        "down": jax.ShapeDtypeStruct((depth, hidden, width), jnp.float32),
    }

    def loss(params, x):
        body = lambda x, w: (x + jax.nn.silu(x @ w["up"]) @ w["down"], None)
        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, params)[0] ** 2)

    x = jax.ShapeDtypeStruct((8, width), jnp.float32)
    kernels = lorax.discover(loss, shapes, x)
    targets = [lorax.Target("all-linear", rank=4, exclude="")]
    base = jax.eval_shape(lambda p: lorax.quantize(p, form, kernels), shapes)
    adapters = jax.eval_shape(lambda p: lorax.init(KEY, p, targets, kernels)[0], shapes)
    used = memory(jax.value_and_grad(lorax.adapt(loss)), adapters, base, x)
    own = sum(leaf.nbytes for leaf in base.values())
    assert own / (2 * depth * width * hidden) < most
    # one layer's two kernels, plus activations and the adapters' gradients
    rest = used.temp_size_in_bytes - 2 * 4 * width * hidden
    assert rest < 4 * 4 * sum(leaf.size for leaf in jax.tree.leaves(adapters))


def test_adapters_remember_their_quantised_base(tmp_path):
    loss, params, x, kernels = layers()
    base = lorax.quantize(params, RULES, kernels)
    adapters, _ = lorax.init(KEY, base, TARGETS, kernels)
    checkpoint.save_adapters(tmp_path, adapters, params=base)
    same = checkpoint.load_adapters(tmp_path, params=base)
    close(same, adapters)
    codes = base["up"].codes.at[1, 2, 3].add(1)
    other = {**base, "up": base["up"].replace(codes=codes)}
    with pytest.raises(ValueError, match="up: the adapters were made for another base"):
        checkpoint.load_adapters(tmp_path, params=other)
    with pytest.raises(ValueError, match="the adapters were made for another base"):
        checkpoint.load_adapters(tmp_path, params=dense(base))


def test_a_train_step_lowers_the_loss():
    import optax

    loss, params, x, kernels = layers(dtype=jnp.bfloat16)
    base = lorax.quantize(params, RULES, kernels)
    adapters, base = lorax.init(KEY, base, TARGETS, kernels)
    tx = optax.adam(1e-3)
    state = training.create_state(KEY, adapters, tx)
    step = jax.jit(training.make_train_step(training.simple_loss(loss), tx))
    seen = []
    for _ in range(5):
        state, metrics = step(state, base, x)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.9 * seen[0] and isinstance(base["up"], Quantized)


def test_an_init_that_moves_the_kernel_comes_before_quantising():
    loss, params, x, kernels = layers()
    base = lorax.quantize(params, RULES, kernels)
    pissa = [lorax.Target("up|down", rank=4, init="pissa")]
    with pytest.raises(ValueError, match="down: init='pissa' moves a part of the ker"):
        lorax.init(KEY, base, pissa, kernels)
    adapters, rest = lorax.init(KEY, params, pissa, kernels)
    base = lorax.quantize(rest, RULES, kernels)  # QPiSSA
    merged = lorax.merge(adapters, base)
    plain = dense(lorax.quantize(params, RULES, kernels))
    error = lambda tree: jnp.linalg.norm(tree["up"] - params["up"])
    assert error(merged) < error(plain)


def test_errors_say_what_to_do():
    loss, params, x, kernels = layers()
    base = lorax.quantize(params, RULES, kernels)
    with pytest.raises(ValueError, match="up: the leaf is quantised, and adapter='fu"):
        lorax.init(KEY, base, [lorax.Target("up", adapter="full")], kernels)
    with pytest.raises(ValueError, match="up: the leaf is already quantised"):
        lorax.quantize(base, [("up", "int8")], kernels)
    with pytest.raises(ValueError, match="groups of 48 inputs do not divide inputs of"):
        lorax.quantize(params, [("up", Int4(group=48))], kernels)
    with pytest.raises(ValueError, match="'int3' is not one of int8, int4, nf4, fp8"):
        lorax.quantize(params, "int3", kernels)
    with pytest.raises(TypeError, match="up.*3 is not a format"):
        lorax.quantize(params, [("up", 3)], kernels)
    with pytest.raises(TypeError, match="a rule is a pair"):
        lorax.quantize(params, ["up"], kernels)
    with pytest.raises(ValueError, match="matches no leaf"):
        lorax.quantize(params, [("upp", "int8")], kernels)
    bad = {**params, "up": params["up"].at[0, 0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="up: the leaf holds NaN or infinite values"):
        lorax.quantize(bad, RULES, kernels)
    scales = base["head"].scales.at[0, 0].set(jnp.nan)
    bad = {**base, "head": base["head"].replace(scales=scales)}
    with pytest.raises(ValueError, match="head: the leaf holds NaN or infinite values"):
        lorax.init(KEY, bad, TARGETS, kernels)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_the_base_has_no_gradient(form):
    loss, params, x, kernels = layers()
    base = lorax.quantize(params, form, kernels)
    adapters, base = lorax.init(KEY, base, TARGETS, kernels)
    if form == "int8":  # JAX refuses integers before the function is called
        with pytest.raises(TypeError, match="grad requires real- or complex-valued"):
            jax.grad(lorax.adapt(loss), argnums=1)(adapters, base, x)
    said = r"quantised leaf of shape \[64, 128\].*does not train. Differentiate with re"
    with pytest.raises(TypeError, match=said):
        jax.grad(lorax.adapt(loss), argnums=1, allow_int=True)(adapters, base, x)


def test_embeddings_are_left_dense_and_first_match_wins():
    table = programs.normal(0, 32, 64)
    params = {"table": table, "w": programs.normal(1, 64, 64), "out": table.T}

    def loss(params, ids):
        return jnp.sum(jnp.tanh(params["table"][ids] @ params["w"]) @ params["out"])

    kernels = lorax.discover(loss, params, jnp.arange(4))
    base = lorax.quantize(params, kernels=kernels)
    assert [name for name, leaf in base.items() if is_quantized(leaf)] == ["w"]
    rules = [("w", None), ("w|out", "int8")]
    base = lorax.quantize(params, rules, kernels)
    assert [name for name, leaf in base.items() if is_quantized(leaf)] == ["out"]
    with pytest.raises(ValueError, match="table: its rows are looked up"):
        lorax.quantize(params, [("table", "int8")], kernels)
