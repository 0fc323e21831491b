"""Growing vocabularies: every family's leaves, against numpy and transformers."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lorax
from lorax import sharding, tree
from lorax.interop import hf, peft
from lorax.models import bert, gemma, gpt2, llama, roberta, t5
from tests.interop import peft_cases as cases
from tests.models import golden

WORDS = 29
LLAMA = dict(vocabulary=WORDS, width=16, layers=2, heads=4, kv_heads=2, head_dim=4)
GEMMA = dict(vocabulary=WORDS, width=16, layers=2, heads=2, kv_heads=1, head_dim=8)
ENCODER = dict(vocabulary=WORDS, positions=16, width=16, layers=2, heads=2, hidden=24)
# family, config, {path along the vocabulary: its axis}
FAMILIES = {
    "gpt2": (gpt2, gpt2.Config(WORDS, 16, 16, 2, 2, 24), {"embed/embedding": 0}),
    "llama": (
        llama,
        llama.Config(**LLAMA, hidden=24, tied=False),
        {"embed/embedding": 0, "head/kernel": 1},
    ),
    "gemma": (
        gemma,
        gemma.Config(**GEMMA, hidden=24, windows=(4, 0)),
        {"embed/embedding": 0},
    ),
    "t5": (
        t5,
        t5.Config(vocabulary=WORDS, width=16, layers=2, heads=2, head_dim=8, hidden=24),
        {"embed/embedding": 0},
    ),
    "roberta": (
        roberta,
        roberta.Config(**ENCODER, head="mlm"),
        {"embed/embedding": 0, "mlm_bias": 0},
    ),
    "bert": (
        bert,
        roberta.Config(**ENCODER, family="bert", offset=0),
        {"embed/embedding": 0},
    ),
}


def drawn(family, config):
    model = family.Model(config)
    draw = np.random.default_rng(0)
    shapes = hf.abstract(model)
    return model, jax.tree.map(
        lambda s: jax.device_put(draw.standard_normal(s.shape).astype(s.dtype)), shapes
    )


@pytest.mark.once
@pytest.mark.parametrize(
    "name, tokens",
    list(zip(FAMILIES, [None, 25] * 3, strict=True)),
    ids=FAMILIES,
)
def test_every_leaf_along_the_vocabulary(name, tokens):
    family, config, along = FAMILIES[name]
    model, params = drawn(family, config)
    grown, found = hf.resize_embeddings(model, params, 33, tokens=tokens, multiple_of=8)
    assert grown.config.vocabulary == 40 and model.config.vocabulary == WORDS
    assert jax.tree.structure(found) == jax.tree.structure(hf.abstract(grown))
    before, after = tree.flatten(params), tree.flatten(found)
    kept = tokens or WORDS
    for path, leaf in before.items():
        if path not in along:
            np.testing.assert_array_equal(after[path], leaf)
            continue
        axis, whole = along[path], np.asarray(leaf, np.float64)
        old = np.take(whole, range(kept), axis)
        mean = np.repeat(old.mean(axis, keepdims=True), 40 - kept, axis)
        np.testing.assert_allclose(
            after[path], np.concatenate([old, mean], axis), atol=1e-6
        )
    assert {p for p in after if after[p].shape != before[p].shape} == {*along}


def test_new_tokens_take_little_and_leave_proportions():
    family, config, _ = FAMILIES["llama"]
    model, params = drawn(family, config)
    grown, found = hf.resize_embeddings(model, params, WORDS + 3)
    ids = jnp.arange(6)[None]
    old, new = (
        jax.nn.softmax(m.apply({"params": p}, ids), -1)
        for m, p in ((model, params), (grown, found))
    )
    assert float(new[..., WORDS:].max()) <= 1 / (WORDS + 3)
    kept = new[..., :WORDS] / new[..., :WORDS].sum(-1, keepdims=True)
    np.testing.assert_allclose(kept, old, atol=1e-6)


def test_a_leaf_stays_where_and_what_it_was():
    family, config, _ = FAMILIES["llama"]
    model, params = drawn(family, config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    where = NamedSharding(mesh, PartitionSpec("tensor", None))
    table = jax.device_put(params["embed"]["embedding"].astype(jnp.bfloat16), where)
    params["embed"]["embedding"] = table
    _, found = hf.resize_embeddings(model, params, 32)
    leaf = found["embed"]["embedding"]
    assert leaf.sharding == where and leaf.dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf[:WORDS], table)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"size": 28}, "size=28 would remove some of the 29 tokens; .*tokens=28"),
        ({"size": 40, "tokens": 30}, "tokens=30, but the embedding has 29 rows"),
        ({"size": 0}, "size=0; give a whole number"),
        ({"size": 30, "multiple_of": True}, "multiple_of=True; give a whole"),
    ],
)
def test_what_is_refused(given, message):
    family, config, _ = FAMILIES["gpt2"]
    with pytest.raises(ValueError, match=message):
        hf.resize_embeddings(*drawn(family, config), **given)


def test_quantised_heads_and_bases_are_refused():
    family, config, _ = FAMILIES["llama"]
    model, params = drawn(family, config)
    forward = lambda params: model.apply({"params": params}, jnp.arange(4)[None])
    kernels = lorax.discover(forward, params)
    packed = lorax.quantize(params, [("head/kernel", "int8")], kernels)
    with pytest.raises(
        ValueError, match="head/kernel: the leaf is quantised.*resize it"
    ):
        hf.resize_embeddings(model, packed, 40)
    with pytest.raises(ValueError, match="params is a Base"):
        hf.resize_embeddings(model, lorax.Base(params, {}), 40)


@pytest.mark.once
@pytest.mark.parametrize("family, tied", [("llama", False), ("gpt2", True)])
def test_transformers_draws_around_the_same_mean(family, tied):
    pytest.importorskip("transformers", reason="needs the golden extra")
    theirs = cases.fresh(family, tied)
    theirs.resize_token_embeddings(34)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, want = hf.load(folder)
    config, params, _ = cases.own(family, tied)
    ours, found = hf.resize_embeddings(type(model)(config), params, 34)
    assert ours.config == model.config
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4)  # 1e-9 ** 0.5 x 9
    jax.tree.map(close, found, want)


@pytest.mark.once
def test_new_tokens_train_alone_and_load_in_peft(tmp_path):
    """A base grown here, its rows written for PEFT, loaded on a base grown there."""
    pytest.importorskip("peft", reason="needs the golden extra")
    import peft as theirs
    import torch

    config, params, _ = cases.own("llama", True)
    model, grown = hf.resize_embeddings(llama.Model(config), params, WORDS + 2)
    forward = lambda params, ids: model.apply({"params": params}, ids)
    ids = np.array([[1, WORDS, 5, WORDS + 1]])
    targets = [
        lorax.Target("layers/q/kernel", rank=2),
        lorax.Target("embed/embedding", adapter="rows", rows=range(WORDS, WORDS + 2)),
    ]
    kernels = lorax.discover(forward, grown, ids)
    adapters, grown = lorax.init(jax.random.key(0), grown, targets, kernels)
    draw = np.random.default_rng(0)
    moved = lambda x: x + 0.3 * draw.standard_normal(x.shape, np.float32)
    adapters = jax.tree.map(moved, adapters)
    peft.save(tmp_path, adapters, model.config, params=grown)
    base = cases.fresh("llama", True)
    base.resize_token_embeddings(WORDS + 2)
    with torch.no_grad():
        out = theirs.PeftModel.from_pretrained(base, tmp_path).eval()
        expected = out(input_ids=torch.tensor(ids)).logits.numpy()
    golden.assert_close(lorax.adapt(forward)(adapters, grown, ids), expected)
    again = peft.load(tmp_path, model.config, grown)
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(same, again, adapters)
