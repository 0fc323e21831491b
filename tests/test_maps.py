"""Maps of whole inputs wherever a kernel is used: what is followed, and what merges.

HRA is a map D of the inputs, LoKr a branch C; their values must equal merging's.
"""

import dataclasses
import re
import warnings
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from lorax import analysis
from lorax.adapters import Hra, Ia3, LoKr, Parametrisation
from lorax.types import Field
from tests import adapter_rows, programs, programs_kernels, programs_nnx  # noqa: F401 (their own)
from tests.test_adapt import assert_close

KEY = jax.random.key(0)
AXES = lorax.Axes((0,), (1,))
FAST = {"xla_backend_optimization_level": 0}
X = programs.normal(9, 5, 6)
HRA, LOKR = "hra", "lokr"


def both(fn, adapters, params, *args):
    """Value and gradient of adapt and of the definition, and where adapt merged."""
    sides = lorax.adapt(fn), programs.definition(fn)
    run = lambda *args: [jax.value_and_grad(side)(*args) for side in sides]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", lorax.MergeWarning)
        lowered = jax.jit(run).lower(adapters, params, *args)
    got, want = lowered.compile(FAST)(adapters, params, *args)
    said = [str(w.message) for w in told if isinstance(w.message, lorax.MergeWarning)]
    places = {re.match(r"(\S+): '(\w+)' at", text) for text in said}
    return got, want, {(m[1], m[2]) for m in places if m}


# program -> what is merged there, by primitive, for D and for C
DOT, CONV, RAGGED = {"dot_general"}, {"conv_general_dilated"}, {"ragged_dot_general"}
PROGRAMS: dict[str, tuple[set[str], set[str]]] = {
    "attention": (set(), set()),
    "tied_embedding": (set(), set()),
    "scanned_remat": (set(), set()),
    "scanned_on_axis_one": (set(), set()),
    "experts": (set(), set()),
    "kernel_on_the_left": (set(), set()),
    "layers_by_index": (set(), set()),
    "conv": (CONV, CONV),
    "ragged": (RAGGED, RAGGED),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("kind", [HRA, LOKR])
def test_adapt_is_merge_then_apply(name, kind):
    """Dots on either side, stacks, experts, scans, remat, tied heads, and the rest."""
    program = programs.PROGRAMS[name]()
    kernels = lorax.discover(program.fn, program.params, *program.args)
    lookups = [re.escape(path) for path, k in kernels.items() if k.op == "gather"]
    targets = [
        dataclasses.replace(t, adapter=kind, exclude=(*t.excluded, *lookups))
        for t in program.targets
    ]
    adapters, params = lorax.init(KEY, program.params, targets, kernels)
    adapters = programs.perturbed(adapters)
    got, want, merged = both(program.fn, adapters, params, *program.args)
    assert_close(got, want)
    assert {primitive for _, primitive in merged} == PROGRAMS[name][kind == LOKR]


def hra(size, seed=0, axes=AXES):
    return Hra(programs.normal(seed, size, 3), axes)


def lokr(in_, out, seed=0, axes=AXES):
    w1, w2 = programs.normal(seed, 2, 2), programs.normal(seed + 1, in_ // 2, out // 2)
    return LoKr(0.5, axes, w1=w1, w2=w2)


SIDES = [("gain", 4), ("input_gain", 6)]
W = {"w": programs.normal(1, 6, 8), "v": programs.normal(2, 6, 4)}


def joined(p):
    return jnp.concatenate([p["v"], p["w"], p["v"]], axis=1)


FUSED = lambda p, x: jnp.tanh(x @ jnp.concatenate([p["v"], p["w"]], axis=1)).sum()
# name: (program, what is merged for D, for C)
VIEWS: dict[str, Any] = {
    "transposed": (lambda p, x: jnp.tanh((p["w"].T @ x.T).T @ p["w"].T).sum(), "", ""),
    "one of two joined": (FUSED, "", ""),
    "the left operand, joined": (
        lambda p, x: jnp.tanh(jnp.concatenate([p["w"], p["v"]], 1).T @ x.T).sum(),
        "",
        "",
    ),
    "joined in the middle, read back": (
        lambda p, x: jnp.tanh(jnp.tanh(x @ joined(p)) @ joined(p).T).sum(),
        "dot_general",
        "",
    ),
    "times a vector of outputs": (
        lambda p, x: jnp.tanh(x @ (p["w"] * jnp.arange(8.0))).sum(),
        "",
        "mul",
    ),
    "times a vector of inputs": (
        lambda p, x: jnp.tanh(x @ (p["w"] * jnp.arange(6.0)[:, None])).sum(),
        "mul",
        "mul",
    ),
    "some outputs": (lambda p, x: jnp.tanh(x @ p["w"][:, 2:5]).sum(), "", "slice"),
    "some inputs": (lambda p, x: jnp.tanh(x[:, :3] @ p["w"][:3]).sum(), *["slice"] * 2),
    "heads behind": (
        lambda p, x: jnp.tanh(
            jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(6, 2, 4))
        ).sum(),
        "",
        "reshape",
    ),
    "inputs in two": (
        lambda p, x: jnp.tanh(
            jnp.einsum("bij,ijd->bd", x.reshape(5, 2, 3), p["w"].reshape(2, 3, 8))
        ).sum(),
        "reshape",
        "reshape",
    ),
    "outputs flipped": (lambda p, x: jnp.tanh(x @ p["w"][:, ::-1]).sum(), "", "rev"),
    "shifted": (lambda p, x: jnp.tanh(x @ (p["w"] + 1)).sum(), "add", "add"),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("kind", [HRA, LOKR])
def test_views_that_leave_the_inputs_whole_follow(name, kind):
    """D follows what happens to outputs alone; C acts on both sides."""
    fn, *merges = VIEWS[name]
    adapters = {"w": hra(6) if kind == HRA else lokr(6, 8)}
    got, want, merged = both(fn, adapters, W, X)
    assert_close(got, want)
    expected = merges[kind == LOKR]
    assert {primitive for _, primitive in merged} == ({expected} if expected else set())
    if expected:
        with pytest.raises(ValueError, match=f"w: '{expected}' .* on_merge='warn'"):
            lorax.adapt(fn, on_merge="error")(adapters, W, X)


def test_parts_of_a_fused_kernel_read_inputs_of_their_own():
    """At the cost of separate kernels; gains beside maps, a frozen part between."""
    gains = {n: 1 + 0.3 * programs.normal(i, s) for i, (n, s) in enumerate(SIDES)}
    adapters = {"w": hra(6), "v": Ia3(AXES, **gains)}
    parts = lambda p: (p["v"], jnp.ones((6, 3)), p["w"])
    fused = lambda p, x: jnp.tanh(x @ jnp.concatenate(parts(p), 1) + 0.5).sum()
    apart = lambda p, x: sum(jnp.tanh(x @ w + 0.5).sum() for w in parts(p))
    got, want, merged = both(fused, adapters, W, X)
    assert_close(got, want)
    assert not merged
    count = lambda fn: analysis.operations(
        jax.make_jaxpr(jax.grad(lorax.adapt(fn, on_merge="error")))(adapters, W, X)
    )
    assert count(fused) == count(apart)


def numbers(p, x):
    """A kernel times numbers, constant or from another leaf, negated and divided."""
    w = (2.5 * (-p["w"] / 3) * jnp.sum(p["v"]))[None]
    return jnp.tanh(x @ w[0]).sum()


def test_gains_without_factors_are_stacked():
    fn = lambda p, x: jnp.tanh(
        jnp.einsum("bi,kio->kbo", x, jnp.stack([p["w"], p["w"] / 2]))
    ).sum()
    adapters = {"w": Ia3(AXES, gain=1 + 0.3 * programs.normal(3, 8))}
    got, want, merged = both(fn, adapters, W, X)
    assert_close(got, want)
    assert not merged


def numbers_of_layers(p, x):
    """Every kernel of a stack times its own number, then a scan."""
    own = p["w"] * jnp.arange(1.0, 4.0)[:, None, None]
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, -own)[0].sum()


ROWS = {name: row for name, *row in adapter_rows.ADAPTERS}
TIMES = {
    "dora": ROWS["dora"],
    "ia3": ("", (6, 5), 0, adapter_rows.IA3()),
    "ia3_feedforward": ("", (6, 5), 0, adapter_rows.IA3(options={"feedforward": True})),
    "oft": ROWS["oft_exact_and_constrained"],
    "hra": ("", (6, 5), 0, adapter_rows.HRA()),
    "lokr": ("", (6, 5), 0, adapter_rows.LOKR()),
    "oft_stacked": ROWS["oft_layer_subset"],
    "lokr_stacked": ROWS["lokr_thin_layer_subset"],
    "walsh_stacked": ROWS["walsh_stacked"],
}


@pytest.mark.parametrize("name", TIMES)
def test_a_kernel_times_a_number_follows_under_every_gain_and_map(name):
    _, shape, _, target = TIMES[name]
    fn = numbers_of_layers if len(shape) == 3 else numbers
    params = {"w": programs.normal(0, *shape), "v": programs.normal(1, 6, 5)}
    kernels = lorax.discover(fn, params, X)
    adapters, params = lorax.init(KEY, params, target, kernels)
    adapters = programs.perturbed(adapters)
    got, want, merged = both(fn, adapters, params, X)
    assert_close(got, want)
    assert not merged


def test_axes_in_another_order_and_stacks():
    """`[out, layers, in2, in1]`, read over (in1, in2): D acts on them flattened."""
    axes = lorax.Axes((3, 2), (0,), (1,))
    leaf, x = programs.normal(0, 5, 3, 2, 4), programs.normal(1, 3, 7, 2, 4)
    adapters = {"w": Hra(programs.normal(2, 3, 4, 2, 3), axes)}
    fn = lambda p, x: jnp.tanh(jnp.einsum("olji,lbji->lbo", p["w"], x)).sum()
    got, want, merged = both(fn, adapters, {"w": leaf}, x)
    assert_close(got, want)
    assert not merged
    u = np.asarray(adapters["w"].u, np.float64)
    for layer in range(3):  # by hand, in float64
        w = np.asarray(leaf[:, layer], np.float64).transpose(2, 1, 0).reshape(8, 5)
        for normal in u[layer].reshape(8, 3).T:
            w -= 2 * np.outer(normal, normal @ w) / (normal @ normal)
        back = w.reshape(4, 2, 5).transpose(2, 1, 0)
        merged = lorax.merge(adapters, {"w": leaf})["w"][:, layer]
        np.testing.assert_allclose(merged, back, atol=5e-6)


@pytest.mark.parametrize("kind", [HRA, LOKR])
def test_maps_compute_at_the_precision_of_the_product(kind):
    adapters = {"w": hra(6) if kind == HRA else lokr(6, 8)}
    fn = lambda p, x: jnp.dot(x, p["w"], precision="highest")
    text = str(jax.make_jaxpr(lorax.adapt(fn, on_merge="error"))(adapters, W, X))
    wanted = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert wanted == text.count("dot_general[") > 2


@flax.struct.dataclass
class Scaled(Parametrisation):
    """W0 times a number: a class with no form for linear operations."""

    by: jax.Array
    axes: lorax.Axes = flax.struct.field(pytree_node=False, default=AXES)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    fields = {"by": Field("by", "one")}

    def delta(self, kernel):
        return kernel * (self.by[0] - 1)

    def merge(self, kernel):
        return kernel * self.by[0]


def test_a_class_without_a_form_is_merged_and_says_so_once():
    fn = lambda p, x: jnp.tanh(x @ p["w"]).sum()
    adapters = {"w": Scaled(jnp.array([2.0]))}
    adapted = lorax.adapt(fn)
    with pytest.warns(lorax.MergeWarning, match="w: Scaled has no form for a linear"):
        got = jax.value_and_grad(adapted)(adapters, W, X)
    assert_close(got, jax.value_and_grad(programs.definition(fn))(adapters, W, X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(adapters, W, X)
    with pytest.raises(ValueError, match="has no form .* pass on_merge='warn'"):
        lorax.adapt(fn, on_merge="error")(adapters, W, X)
    dropping = {"w": Scaled(jnp.array([2.0]), dropout=0.5)}
    with pytest.raises(ValueError, match="Scaled has none; set dropout=0"):
        adapted(dropping, W, X, lora_key=KEY)


def test_dropout_where_a_branch_is_merged_is_refused():
    adapters = {"w": lokr(6, 8).replace(dropout=0.5)}
    fn = lambda p, x: jnp.tanh(x @ p["w"]).sum()
    wet = lorax.adapt(fn, on_merge="error")(adapters, W, X, lora_key=KEY)
    assert wet != lorax.adapt(fn)(adapters, W, X)
    refused = pytest.raises(ValueError, match="set dropout=0 for this target")
    with pytest.warns(lorax.MergeWarning), refused:
        lorax.adapt(VIEWS["some outputs"][0])(adapters, W, X, lora_key=KEY)


MESH = 4
SPECS = {"whole": P(), "outputs": P(None, "x"), "inputs": P("x")}


@pytest.mark.parametrize(
    "kind,cut",
    [(HRA, "outputs"), (HRA, "inputs"), (LOKR, "whole"), (LOKR, "outputs")],
)
def test_inside_shard_map(kind, cut):
    """D follows a kernel split along its outputs, C one that every shard has whole."""
    mesh = jax.make_mesh((MESH,), ("x",), axis_types=(AxisType.Auto,))
    params, x = {"w": programs.normal(0, 8, 8)}, programs.normal(1, 4, 8)
    adapters = {"w": hra(8) if kind == HRA else lokr(8, 8)}
    specs = {
        "whole": (P("x"), P(), P("x")),
        "outputs": (P(), P(None, "x"), P(None, "x")),
    }
    specs["inputs"] = P(None, "x"), P("x"), P()

    def body(x, w):
        y = x @ w
        return jax.lax.psum(y, "x") if cut == "inputs" else y

    x_spec, w_spec, out = specs[cut]
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(x_spec, w_spec), out_specs=out)
    fn = lambda p, x: jnp.tanh(mapped(x, p["w"])).sum()
    got, want, merged = both(fn, adapters, params, x)
    assert_close(got, want)
    follows = cut == "whole" or (cut == "outputs" and kind == HRA)
    assert merged == (set() if follows else {("w", "shard_map")})


@pytest.mark.parametrize(
    "kind,cut", [("oft", "outputs"), (HRA, "inputs"), (LOKR, "outputs")]
)
def test_on_an_explicit_mesh(kind, cut):
    """The compiler places the maps; results are sharded as without them."""
    mesh = jax.make_mesh((MESH,), ("x",), axis_types=(AxisType.Explicit,))
    put = lambda x, spec: jax.device_put(np.asarray(x), NamedSharding(mesh, spec))
    out = P(None, "x") if cut == "outputs" else P()

    def fn(p, x):
        h = jnp.einsum("bi,io->bo", x, p["w"], out_sharding=out)
        return jnp.tanh(h).sum()

    with jax.set_mesh(mesh):
        params = {"w": put(programs.normal(0, 8, 8), SPECS[cut])}
        x = put(programs.normal(1, 4, 8), P())
        options = {"block_size": 4} if kind == "oft" else {}
        target = lorax.Target("w", 2, adapter=kind, options=options)
        adapters, params = lorax.init(KEY, params, target)
        adapters = programs.perturbed(adapters)
        got, want, merged = both(fn, adapters, params, x)
    assert not merged
    assert_close(got, want)
