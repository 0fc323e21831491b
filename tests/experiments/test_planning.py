"""The planner's parts: names, counts, reading HLO, and a plan for eight CPU devices."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import (
    gemma4_31b_lora,
    llama3_8b_lora,
    llama3_70b_lora,
    llama3_405b_lora,
    mixtral_8x7b_lora,
)
from experiments.planning import (
    best,
    estimates,
    program,
    rendering,
    roofline,
    traffic,
)
from experiments.planning import topology as topologies
from lorax import analysis, sharding

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
        ("v4-128", "v4:4x4x4", 64),
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
        cores = 2 if kind in ("v4", "v5p") else 1
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
    assert clock == pytest.approx(
        {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}, rel=0.01
    )


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
    # backwards: every product again, plus one for each of its two arguments; only one
    # for the convolution, whose kernel is a constant
    traced = jax.jit(jax.grad(loss)).trace(*args)
    assert analysis.operations(traced.jaxpr) >= 4 * 6 * 2 * 7 * 4 * 4


def test_operations_of_experts_and_of_shared_programs_by_hand():
    rows, kernels, sizes = jnp.ones((9, 4)), jnp.ones((3, 4, 5)), jnp.array([2, 0, 7])
    ragged = lambda x, w: jax.lax.ragged_dot(x, w, sizes).sum()
    count = lambda f, *args: analysis.operations(jax.jit(f).trace(*args).jaxpr)
    assert count(ragged, rows, kernels) == 2 * 9 * 4 * 5
    assert count(jax.grad(ragged), rows, kernels) == 2 * 2 * 9 * 4 * 5
    assert count(jax.grad(ragged, argnums=1), rows, kernels) == 2 * 2 * 9 * 4 * 5

    mesh, P = sharding.make_mesh(fsdp=4, tensor=2), jax.sharding.PartitionSpec
    cut = {"mesh": mesh, "in_specs": (P("fsdp"), P()), "out_specs": P("fsdp")}
    shared = jax.shard_map(jnp.matmul, axis_names={"fsdp"}, **cut)
    assert count(shared, jnp.ones((8, 3)), jnp.ones((3, 5))) == 2 * 8 * 3 * 5
    # along "tensor" both devices do the same work
    shared = jax.shard_map(jnp.matmul, check_vma=False, **cut)
    assert count(shared, jnp.ones((8, 3)), jnp.ones((3, 5))) == 2 * 2 * 8 * 3 * 5


@pytest.mark.parametrize("dispatch, visited", [("ragged", 2), ("dense", 8)])
def test_a_step_of_a_mixture_by_hand(dispatch, visited):
    """Experts on eight devices, each of which may get all tokens: counted on one."""
    config = mixtral_8x7b_lora.get_config("runlocal")
    config.model.dispatch = dispatch
    assert config.sharding.expert == 8
    plain = program.without_remat(config)
    devices = topologies.devices(topologies.parse("cpu:8"))[:1]
    found = analysis.operations(program.build(plain, devices).trace().jaxpr)
    batch, time, width, hidden, rank, vocabulary, layers = 8, 32, 64, 96, 4, 256, 2
    tokens, visits = batch * time, visited * batch * time
    linear = [(tokens, width, width)] * 4  # q, k, v, o: rows, in, out
    linear += [(visits, width, 2 * hidden), (visits, hidden, width)]
    router, gathered = 2 * tokens * width * 8, 2 * visits * width
    frozen = sum(2 * rows * n * m for rows, n, m in linear) + router
    thin = sum(2 * rows * rank * (n + m) for rows, n, m in linear)
    scores = 2 * 2 * batch * time * time * width
    head = 2 * tokens * width * vocabulary
    layer = 2 * frozen + 3 * (thin + gathered + scores)
    if dispatch == "dense":  # the weight of each expert, zero for most
        layer += 2 * 2 * tokens * 2 * 8
    assert found == layers * layer + 2 * head


def test_operations_as_xla_counts_them():
    def loss(w, x):
        for layer in w:
            x = x @ layer
        return (x**2).sum()

    args = jnp.ones((3, 64, 64)), jnp.ones((32, 64))
    traced = jax.jit(jax.grad(loss)).trace(*args)
    xla = traced.lower().compile().cost_analysis()["flops"]
    assert analysis.operations(traced.jaxpr) == pytest.approx(xla, rel=0.05)


def tiny(**changes):
    config = llama3_8b_lora.get_config("runlocal").unlock()
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return config.lock()


@pytest.fixture(scope="module")
def plan():
    config = tiny(sharding__tensor=2, run__steps=50)
    return estimates.make_plan(config, topologies.parse("cpu:8"), evaluated=True)


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
    # no gradients, and no second copy of the weights
    assert memory.evaluation < memory.activations
    assert plan.mesh == {"data": 1, "fsdp": 4, "tensor": 2}
    received = plan.facts.bytes_by_kind()
    assert received["all-gather"] > 0 and received["all-reduce"] > 0
    assert plan.flops > plan.model_flops > 0
    assert plan.verdict == "no limit known" and plan.times is None


@pytest.mark.parametrize(
    ("make", "count"),  # as Meta counts them
    [
        (llama3_8b_lora.get_config, 8_030_261_248),
        (llama3_70b_lora.get_config, 70_553_706_496),
        (llama3_405b_lora.get_config, 405_853_388_800),
    ],
)
def test_full_size_by_hand(make, count):
    config = make().unlock()
    config.sharding.tensor, config.sharding.adapters = 2, "kernels"
    devices = topologies.devices(topologies.parse("cpu:8"))
    built = program.build(config, devices)
    weights, adapters = by_hand(config.model.published.to_dict(), 16, 4, 2)
    assert estimates.shard_bytes(built.params) == weights
    assert estimates.shard_bytes(built.state.adapters) == adapters
    config.sharding.adapters = "all"
    cut = program.build(config, devices).state.adapters
    elements = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(cut))
    assert estimates.shard_bytes(cut) == 4 * elements / 8
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(built.params)]
    assert sum(sizes) == count


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
        ({"sharding__fsdp": 3}, "3 devices do not fit the 8 there are"),
        ({"data__batch_size": 12}, "data.batch_size=12 is not a multiple of the 8"),
        ({"eval__batch_size": 12}, "eval.batch_size=12 is not a multiple of the 8"),
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


def made(total, seconds, settings, refused="", opaque=0):
    """A plan for 16 chips: products take a second, everything takes twice that."""
    memory = estimates.Memory(0, 0, 0, 0, 0, 0, 2**30, total, 15.75 * 2**30)
    gathered = traffic.Collective("all-gather", "bf16[1]", 2**30, 1)
    return estimates.Plan(
        topology=topologies.parse("v5e:4x4"),
        mesh={},
        settings=settings,
        memory=None if refused else memory,
        refused=refused,
        flops=2e12,
        model_flops=1e12,
        facts=None if refused else traffic.Facts(7, opaque, (gathered,), 2**31, 2**28),
        times=None if refused else roofline.Times(1.0, 0.5, seconds, 0.25),
        seconds=60.0,
        tokens=16_000,
    )


def test_a_report_says_what_is_estimated_and_what_does_not_fit():
    text = rendering.render(made(10 * 2**30, 2.0, "lora"))
    assert "fits" in text and "36.5%" in text and "16 chips" in text
    rows = dict(line.strip().split("  ", 1) for line in text.splitlines()[2:])
    rows = {name: value.strip() for name, value in rows.items()}
    bound = "(estimate, not measured)"
    assert rows["products"] == "1 s at 197 TFLOP/s"
    assert rows["HBM"] == "2 s at 819 GB/s"
    assert rows["transfers"] == "0.25 s at 50 GB/s per link"
    assert rows["step, all at once"] == f"2 s {bound}"
    assert rows["step, one after another"] == f"3.75 s {bound}"
    assert rows["tokens/s per chip"] == f"267, one after another {bound}"
    assert rows["MFU"] == f"26.7%, one after another {bound}"
    assert "times the step" in rows["error"]
    assert rows["cycles"] == "7 (XLA estimate, not measured)"
    assert rows["evaluation instead"] == "1.000 GiB per chip"
    assert rows["HBM read and written"] == "2.000 GiB per chip and step"
    assert rows["to and from the host"] == "0.250 GiB per chip and step"
    assert "7; 3 kernels have none" in rendering.render(made(1, 1, "", opaque=3))
    assert made(15 * 2**30, 1, "").verdict == "fits, with less than 10% room"
    assert made(16 * 2**30, 1, "").verdict == "does not fit"
    refused = made(0, None, "", "exceeds available HBM")
    assert refused.verdict == "does not fit" and refused.pace == 0
    assert "exceeds available HBM" in rendering.render(refused)


@pytest.fixture(scope="module")
def searched():
    config = tiny(data__batch_size=8)
    return best.candidates(config, topologies.parse("cpu:8"))


def test_a_search_ranks_by_time_and_compiles_what_should_fit(searched, monkeypatch):
    seconds = [one.seconds for one in searched]
    assert seconds == sorted(seconds)
    seen = {(c.config.sharding.tensor, c.config.model.quantize) for c in searched}
    assert {(1, ""), (8, "int8"), (2, "int8")} <= seen
    same = {
        c.config.model.remat: c
        for c in searched
        if (c.config.sharding.tensor, c.config.model.quantize) == (1, "")
        and c.config.data.batch_size == 8
    }
    full, saved = same["full"], same["save=q,k,v,o"]
    assert full.memory < saved.memory and full.seconds >= saved.seconds
    assert same["offload=input"].memory < full.memory
    monkeypatch.setattr(best, "candidates", lambda *_: searched)
    plans = iter([made(2**30 * n, 9 - n, f"number {n}") for n in (1, 2, 17, 3)])
    monkeypatch.setattr(best.estimates, "make_plan", lambda *_: next(plans))
    told = []
    topology = topologies.parse("cpu:8")
    rows = best.render(best.run(tiny(), topology, told.append)).splitlines()
    assert told[0].startswith(f"{len(searched)} settings") and len(told) == 5
    # the most tokens a second first, and what does not fit last
    assert [row.split()[-1] for row in rows[1:5]] == ["3", "2", "1", "17"]


def test_a_search_counts_layers_where_a_stack_holds_periods_of_them(monkeypatch):
    config = gemma4_31b_lora.get_config("runlocal")
    model = program.make_model(config.model).config
    assert sum(model.stacks.values()) < model.layers
    for name, few in {"TENSOR": (1,), "FORMATS": ("",), "BATCHES": (1,)}.items():
        monkeypatch.setattr(best, name, few)
    monkeypatch.setattr(best, "REMAT", ("full", "save=attention"))
    found = best.candidates(config, topologies.parse("cpu:8"))
    full, saved = sorted(one.memory for one in found)
    tokens = config.data.batch_size * max(config.data.lengths) / 8
    kept = tokens * model.layers * model.heads * model.head_dim * 2  # bfloat16
    assert saved - full == kept


def test_a_search_without_a_setting(searched, monkeypatch):
    topology = topologies.parse("v5e:2x4")
    monkeypatch.setattr(best, "candidates", lambda *_: [])
    with pytest.raises(ValueError, match="no mesh divides .* a batch of 8, or half"):
        best.run(tiny(), topology)
    big = [one._replace(memory=1e12) for one in searched]
    monkeypatch.setattr(best, "candidates", lambda *_: big)
    with pytest.raises(ValueError, match=r"the smallest should take 931\.3 GiB"):
        best.run(tiny(), topology)


def test_v5p_needs_no_tensor_devices():
    config = llama3_70b_lora.get_config("v5p")
    assert config.sharding.topology == "v5p:4x4x4" and config.sharding.tensor == 1
    assert np.prod(config.data.lengths) * config.data.batch_size == 64 * 4096
