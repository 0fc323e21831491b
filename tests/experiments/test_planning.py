"""The planner's parts: names, counts, reading HLO, and a plan for eight CPU devices."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import llama3_8b_lora, llama3_70b_lora
from experiments.planning import alternatives, estimates, hlo, program
from experiments.planning import topology as topologies
from lorax import analysis

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("given", "name", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v6e-256", "v6e:16x16", 256),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-8", "v5p:2x2x1", 4),
        ("cpu:8", "cpu:8", 8),
    ],
)
def test_topologies(given, name, chips):
    found = topologies.parse(given)
    assert (found.name, found.chips) == (name, chips)
    assert str(chips) in str(found) and given in str(found)


def test_names_of_the_cloud_count_as_the_cloud_does():
    for given in topologies.CLOUD:
        kind, count = given.split("-")
        cores = 2 if kind == "v5p" else 1
        assert topologies.parse(given).chips * cores == int(count), given


@pytest.mark.parametrize("name", ["v5e", "v9z:4x4", "v5p-12", "v5e:4x0", "cpu:0", "8"])
def test_unknown_topologies(name):
    with pytest.raises(ValueError, match=f"unknown topology '{name}'.*v5litepod-16"):
        topologies.parse(name)


def test_a_topology_of_other_dimensions():
    with pytest.raises(ValueError, match="v5p slices have 3 dimensions, such as"):
        topologies.parse("v5p:4x4")


def test_clocks_are_those_published():
    clock = {name: chip.clock / 1e9 for name, chip in topologies.CHIPS.items()}
    assert clock == pytest.approx({"v5e": 1.5, "v5p": 1.75, "v6e": 1.75}, rel=0.01)


def test_libtpu_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[tpu\]'"):
        topologies.devices(topologies.parse("v5e:4x4"))


def test_too_few_cpu_devices():
    with pytest.raises(ValueError, match="this process has 8 CPU devices; set XLA_FL"):
        topologies.devices(topologies.parse("cpu:9"))


def test_operations_by_hand():
    def loss(w, x):
        body = lambda x, w: (jnp.tanh(x @ w), None)
        out, _ = jax.lax.scan(jax.checkpoint(body), x, w)
        kernel = jnp.ones((3, 4, 5))  # [window, in, out]
        return jax.lax.conv(out[None].mT, kernel.transpose(2, 1, 0), (1,), "SAME").sum()

    args = jnp.ones((6, 4, 4)), jnp.ones((7, 4))
    forward = 6 * 2 * 7 * 4 * 4 + 2 * 7 * 5 * 3 * 4
    assert analysis.operations(jax.jit(loss).trace(*args).jaxpr) == forward
    # backwards: every product again, and two more for its two arguments; of the
    # convolution, whose kernel is a constant, one
    traced = jax.jit(jax.grad(loss)).trace(*args)
    assert analysis.operations(traced.jaxpr) >= 4 * 6 * 2 * 7 * 4 * 4


def test_operations_as_xla_counts_them():
    def loss(w, x):
        for layer in w:
            x = x @ layer
        return (x**2).sum()

    args = jnp.ones((3, 64, 64)), jnp.ones((32, 64))
    traced = jax.jit(jax.grad(loss)).trace(*args)
    xla = traced.lower().compile().cost_analysis()["flops"]
    assert analysis.operations(traced.jaxpr) == pytest.approx(xla, rel=0.05)


HLO = """HloModule jit_step

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %n = f32[8,4]{1,0} negate(%p), backend_config={"estimated_cycles":"1000"}
}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%begin (q: f32[8,4]) -> f32[64,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %all-gather.7 = f32[64,4]{1,0} all-gather(%q), channel_id=3, dimensions={0}
}

%inner_body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %e = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %f = f32[8,4]{1,0} fusion(%e), calls=%fused, backend_config={"estimated_cycles":"5"}
  %w = (f32[64,4]{1,0}, u32[]) fusion(%e), calls=%begin
  ROOT %r = (s32[], f32[8,4]{1,0}) tuple(%c, %f)
}

%inner_condition (t: (s32[], f32[8,4])) -> pred[] {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %g = bf16[2,8]{1,0:T(8,128)(2,1)} all-reduce(%h), channel_id=1, to_apply=%sum
  ROOT %while.1 = (s32[], f32[8,4]{1,0}) while(%t), condition=%inner_condition, body=%inner_body
}

%condition (t: (s32[], f32[8,4])) -> pred[] {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %u = pred[] get-tuple-element(%t), index=0
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %while.2 = (s32[], f32[8,4]{1,0}) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %s = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), channel_id=9, dimensions={0}
  %d = f32[64]{0} all-gather-done(%s)
  %k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %out = f32[8,4]{1,0} copy(%a), backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def test_hlo_by_hand():
    found = hlo.read(HLO)
    # the fusion's own estimate, 5 in each of 6 x 10 trips, not those inside of it
    assert found.cycles == 5 * 60 + 7 and found.opaque == 1
    assert found.bytes_by_kind() == {
        "all-gather": 60 * 64 * 4 * 4 + 64 * 4,
        "all-reduce": 10 * 2 * 8 * 2,
    }
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("HloModule nothing")


def tiny(**changes):
    config = llama3_8b_lora.get_config("runlocal").unlock()
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return config.lock()


@pytest.fixture(scope="module")
def plan():
    config = tiny(sharding__tensor=2, run__steps=50)
    return estimates.make_plan(config, topologies.parse("cpu:8"))


def by_hand(fields, rank, fsdp, tensor, itemsize=2):
    """Bytes of one device's weights and adapters, from the fields of a config.json."""
    width, mlp = fields["hidden_size"], fields["intermediate_size"]
    layers, vocabulary = fields["num_hidden_layers"], fields["vocab_size"]
    heads, kv = fields["num_attention_heads"], fields["num_key_value_heads"]
    q, kv = width, kv * (width // heads)
    linear = [(width, q), (width, kv), (width, kv), (width, mlp), (width, mlp)]
    back = [(q, width), (mlp, width)]
    kernels = layers * sum(n * m for n, m in linear + back)
    cut = (kernels + 2 * vocabulary * width) / (fsdp * tensor)
    weights = itemsize * (cut + (2 * layers + 1) * width)
    ins = sum(n / fsdp + m / tensor for n, m in linear)
    outs = sum(n / tensor + m / fsdp for n, m in back)
    return weights, 4 * rank * layers * (ins + outs)


def test_a_plan_for_eight_cpu_devices(plan):
    memory = plan.memory
    weights, adapters = by_hand(tiny().model.published.to_dict(), 4, 4, 2)
    assert memory.weights == weights and memory.adapters == adapters
    # two moments of Adam; counters and keys
    assert memory.optimizer == pytest.approx(2 * adapters, rel=0.01)
    parts = weights + memory.adapters + memory.optimizer + memory.batch
    assert memory.arguments == pytest.approx(parts, rel=0.02)
    assert memory.activations > 0 and memory.headroom is None
    assert plan.mesh == {"data": 1, "fsdp": 4, "tensor": 2}
    assert plan.collectives["all-gather"] > 0 and plan.collectives["all-reduce"] > 0
    assert plan.flops > plan.model_flops > 0
    assert plan.verdict == "no limit known" and plan.step_seconds is None


@pytest.mark.parametrize(
    "make", [llama3_8b_lora.get_config, llama3_70b_lora.get_config]
)
def test_full_size_by_hand(make):
    config = make().unlock()
    config.sharding.tensor = 2
    built = program.build(config, topologies.devices(topologies.parse("cpu:8")))
    weights, adapters = by_hand(config.model.published.to_dict(), 16, 4, 2)
    assert estimates.shard_bytes(built.params) == weights
    assert estimates.shard_bytes(built.state.adapters) == adapters
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(built.params)]
    assert sum(sizes) in (8_030_261_248, 70_553_706_496)  # as Meta counts them


def test_a_quantised_base_by_hand():
    devices = topologies.devices(topologies.parse("cpu:8"))
    config = llama3_8b_lora.get_config()
    config.model.quantize = "nf4"
    built = program.build(config, devices)
    leaves = jax.tree.leaves(built.params)
    held = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    attention, mlp = 4096 * (2 * 4096 + 2 * 1024), 3 * 4096 * 14336
    kernels = 32 * (attention + mlp)
    dense = 8_030_261_248 - kernels  # embedding, head and norms
    # codes, 8-bit scales in blocks of 64, theirs in blocks of 256
    bytes_each = 1 / 2 + 1 / 64 + 4 / (64 * 256)
    assert held == pytest.approx(2 * dense + kernels * bytes_each, rel=1e-6)
    assert "nf4 base" in estimates.settings(config, {})


def test_merged_kernels_are_another_program():
    config = tiny()
    devices = topologies.devices(topologies.parse("cpu:8"))
    traces = {form: program.build(config, devices, form) for form in program.FORMS}
    count = {f: analysis.operations(b.trace().jaxpr) for f, b in traces.items()}
    assert count["merge"] > 1.1 * count["adapt"]  # dense gradients of the kernels
    with pytest.raises(ValueError, match="choose one of adapt, merge"):
        program.build(config, devices, "fold")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sharding__fsdp": 3}, "3 devices do not make up the 8 there are"),
        ({"data__batch_size": 12}, "batch_size=12 is not divided by the 8 devices"),
        (
            {"model__published": {"num_key_value_heads": 2}, "sharding__tensor": 4},
            r"kv_heads\) .* has size 2, which the 4 devices of tensor do not divide",
        ),
        ({"model__published": {}}, "give the fields of the checkpoint's config.json"),
    ],
)
def test_bad_input_is_refused_before_anything_compiles(changes, said, monkeypatch):
    fields = changes.get("model__published")
    if fields:
        whole = {**tiny().model.published.to_dict(), **fields}
        changes = {**changes, "model__published": whole}
    monkeypatch.setattr(
        estimates, "_compile", lambda lowered: pytest.fail("it compiled")
    )
    config = tiny(**{k: v for k, v in changes.items() if k != "model__published"})
    if fields is not None:
        config.unlock().model.published = type(config.model)(
            changes["model__published"]
        )
    with pytest.raises(ValueError, match=said):
        estimates.make_plan(config, topologies.parse("cpu:8"))


def test_inits_that_look_at_data_are_planned_by_their_shapes():
    config = tiny(adapter__init="lora_ga")
    state = program.build(config, topologies.devices(topologies.parse("cpu:8"))).state
    assert state.adapters["layers/q/kernel"].a.shape == (2, 64, 4)


def made(total, cycles, settings, refused="", opaque=0):
    memory = estimates.Memory(0, 0, 0, 0, 0, 0, total, 15.75 * 2**30)
    topology = topologies.parse("v5e:4x4")
    return estimates.Plan(
        topology=topology,
        mesh={},
        settings=settings,
        memory=None if refused else memory,
        refused=refused,
        flops=2e12,
        model_flops=1e12,
        cycles=cycles,
        opaque=opaque,
        collectives={"all-gather": 2**30},
        seconds=60.0,
        tokens=1000,
    )


def test_a_report_says_what_is_estimated_and_what_does_not_fit():
    text = estimates.render(made(10 * 2**30, 3 * 10**9, "lora"))
    assert "fits" in text and "36.5%" in text and "16 chips" in text
    estimated = [line for line in text.splitlines() if "cycles" in line]
    estimated += [line for line in text.splitlines() if "MFU" in line or " s," in line]
    assert len(estimated) == 3
    assert all("XLA estimate, not measured" in line for line in estimated)
    # 1e12 operations in 3e9 cycles of a chip that does 4 x 128 x 128 x 2 in one
    assert f"{1e12 / (3e9 * 131072):.1%}" in text
    assert "transfers and 3 kernels left out" in estimates.render(made(1, 1, "", "", 3))
    assert made(15 * 2**30, 1, "").verdict == "fits, with less than 10% room"
    assert made(16 * 2**30, 1, "").verdict == "does not fit"
    refused = made(0, None, "", "exceeds available HBM")
    assert refused.verdict == "does not fit"
    assert "exceeds available HBM" in estimates.render(refused)


def test_a_sweep_ranks_by_memory_and_compiles_the_first(monkeypatch):
    monkeypatch.setattr(alternatives, "BATCHES", (1,))
    topology = topologies.parse("cpu:8")
    config = tiny(data__batch_size=8)
    found = alternatives.candidates(config, topology)
    estimates = [one.estimate for one in found]
    assert estimates == sorted(estimates) and len(found) > 2
    seen = {(c.config.sharding.tensor, c.config.model.remat) for c in found}
    assert {(1, "full"), (8, "full"), (2, "dots")} <= seen
    asked = []
    plans = iter([made(2**30 * n, 10**9 * n, f"number {n}") for n in range(1, 13)])
    monkeypatch.setattr(alternatives.estimates, "make_plan", lambda *_: next(plans))
    monkeypatch.setattr(alternatives, "LIMIT", 3)
    table = alternatives.render(alternatives.run(config, topology, asked.append))
    assert len(asked) == 3
    rows = table.splitlines()
    assert [row.split()[-1] for row in rows[1:4]] == ["1", "2", "3"]
    assert "XLA estimate, not measured" in rows[-1]
    odd = tiny(data__batch_size=3, sharding__data=8)
    with pytest.raises(ValueError, match="no mesh divides the batch of 3"):
        alternatives.run(odd, topology)


def test_v5p_needs_no_tensor_devices():
    config = llama3_70b_lora.get_config("v5p")
    assert config.sharding.topology == "v5p:4x4x4" and config.sharding.tensor == 1
    assert np.prod(config.data.lengths) * config.data.batch_size == 64 * 4096
