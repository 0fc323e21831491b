"""Checkpoints that are quantised as they are read."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lorax
from lorax import sharding
from lorax.interop import files, hf
from lorax.models import gpt2, llama, roberta
from lorax.quantized import NF4, Int4, Quantized
from tests.interop.test_hf import SMALL, tensors_of, write

pytestmark = pytest.mark.once

GPT2 = gpt2.Config(61, 32, 64, 2, 4, 128)
MIXED = [(".*/q/kernel", "int8"), ("all-linear", Int4(group=16))]


def discovered(model, params):
    run = lambda params, x: jnp.sum(model.apply({"params": params}, x) ** 2)
    return lorax.discover(run, params, jnp.zeros((2, 5), jnp.int32))


def same(found, want):
    assert jax.tree.structure(found) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    return sum(
        isinstance(leaf, Quantized) for leaf in lorax.tree.flatten(found).values()
    )


RULES = {"fp8": "fp8", "nf4": NF4(block=16), "mixed": MIXED}


@pytest.mark.parametrize(
    "rules, scan", [("fp8", True), ("fp8", False), ("nf4", True), ("mixed", False)]
)
def test_the_leaves_are_those_of_quantize(tmp_path, rules, scan):
    source = write(tmp_path / "a", SMALL, tensors_of(SMALL, dtype=jnp.bfloat16))
    model, dense = hf.load(source, scan=scan)
    _, found = hf.load(source, scan=scan, quantize=RULES[rules])
    want = lorax.quantize(dense, RULES[rules], discovered(model, dense))
    assert same(found, want) == (7 if scan else 14)


def test_wide_kernels_and_fused_ones(tmp_path):
    """Means over many scales, and GPT-2's kernels, which are transposed on disk."""
    wide = llama.Config(61, 64, 512, 2, 8, 2, 64, 1536, tied=True)
    for config, rules in ((wide, [(".*/up/kernel", "nf4")]), (GPT2, "int8")):
        source = write(
            tmp_path / config.to_hf()["model_type"], config, tensors_of(config)
        )
        model, dense = hf.load(source)
        _, found = hf.load(source, quantize=rules)
        same(found, lorax.quantize(dense, rules, discovered(model, dense)))


def mesh_of(x, y):
    return Mesh(np.array(jax.devices()[: x * y]).reshape(x, y), ("x", "y"))


def test_codes_lie_where_their_kernel_would(tmp_path):
    source = write(tmp_path / "a", SMALL, tensors_of(SMALL))
    packs = [(".*/up/kernel", NF4(block=16)), ("all-linear", "int8")]
    _, whole = hf.load(source, quantize=packs)
    rules = [
        (".*/(up|gate)/kernel", PartitionSpec(None, "x", "y")),
        (".*", PartitionSpec()),
    ]

    def lie(model, shapes):
        return sharding.place(shapes, mesh_of(2, 2), rules=rules).tree(shapes)

    _, found = hf.load(source, quantize=packs, shardings=lie)
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    up = found["layers"]["up"]["kernel"]
    assert up.codes.sharding.spec == PartitionSpec(None, "x", "y")
    assert up.codes.addressable_shards[0].data.shape == (2, 8, 24)

    # one sharding per kernel, as for the dense model
    spec = lambda shape: PartitionSpec() if shape.ndim < 3 else PartitionSpec(None, "x")
    place = lambda shape: NamedSharding(mesh_of(2, 1), spec(shape))
    given = jax.tree.map(place, hf.abstract(llama.Model(SMALL)))
    _, found = hf.load(source, quantize=packs, shardings=given)
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    up = found["layers"]["up"]["kernel"]
    assert up.codes.addressable_shards[0].data.shape == (2, 8, 48)
    assert up.scales.absmax.sharding.is_fully_replicated


def test_no_more_than_a_layer_is_dense(tmp_path, monkeypatch):
    """Measures JAX's arrays at every tensor read, and numpy's peak."""
    config = llama.Config(16, 64, 256, 12, 4, 4, 64, 768, tied=True)
    source = write(tmp_path / "a", config, tensors_of(config))
    before = sum(array.nbytes for array in jax.live_arrays())
    read, live = files.Tensor.read, []

    def counted(self, *args):
        live.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        return read(self, *args)

    monkeypatch.setattr(files.Tensor, "read", counted)
    tracemalloc.start()
    _, found = hf.load(source, quantize="int8")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    packed = sum(array.nbytes for array in jax.tree.leaves(found))
    layer, dense = 4 * 256 * 768, 12 * 4 * (4 * 256 * 256 + 3 * 256 * 768)
    print(f"dense {dense}, packed {packed}, layer {layer}: {max(live)} and {peak}")
    assert max(live) < packed + 2 * layer < dense / 3
    assert peak < packed + 4 * layer < dense / 2.5


def test_errors(tmp_path):
    source = write(tmp_path / "a", SMALL, tensors_of(SMALL))
    with pytest.raises(ValueError, match="layers/down/kernel: groups of 64 inputs do"):
        hf.load(source, quantize="nf4")  # 48 inputs
    with pytest.raises(ValueError, match="'nf5' is not one of int8, int4, nf4, fp8"):
        hf.load(source, quantize="nf5")
    with pytest.raises(ValueError, match="embed/embedding: its rows are looked up"):
        hf.load(source, quantize=[("embed.*", "int8")])
    with pytest.raises(ValueError, match="'layers/x' matches no leaf"):
        hf.load(source, quantize=[("layers/x", "int8")])


def test_what_is_written_is_dense(tmp_path):
    source = write(tmp_path / "a", SMALL, tensors_of(SMALL))
    model, params = hf.load(source, quantize=[(".*/up/kernel", "int8")])
    with pytest.raises(ValueError, match="up/kernel: the leaf is quantised.*merge"):
        hf.save(tmp_path / "b", model.config, params)
    dense = lorax.merge({}, params)
    hf.save(tmp_path / "b", model.config, dense)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "b")[1], dense)


def test_a_head_that_is_drawn_stays_dense(tmp_path):
    config = roberta.Config(
        vocabulary=61, positions=34, width=32, layers=2, heads=4, hidden=48, head="mlm"
    )
    source = write(tmp_path / "a", config, tensors_of(config))
    given = {"key": jax.random.key(0), "head": "classification", "labels": 3}
    _, params = hf.load(source, quantize=[(".*/up/kernel", "int8")], **given)
    heads = [path for path in lorax.tree.flatten(params) if "classifier" in path]
    kernel = next(path for path in heads if path.endswith("kernel"))
    rules = [(kernel, "int8")]
    with pytest.raises(ValueError, match="lacks this leaf.*with a rule .'.*', None"):
        hf.load(source, quantize=rules, **given)
