"""MaxText's trees, as MaxText writes them with Orbax: weights and LoRA, both ways.

Names, axes and values are written out here by hand, from MaxText's sources.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lorax
from lorax import tree
from lorax.interop import hf, maxtext
from lorax.models import gemma, llama

pytestmark = pytest.mark.once

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LLAMA = SIZES | {"model_type": "llama"}
GEMMA = SIZES | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 8,  # a block of six, and two
    "sliding_window": 4,
}
MODELS = {
    "llama 3.1": llama.Config.from_hf({**LLAMA, "rope_scaling": ROPE}),
    "llama, tied": llama.Config.from_hf({**LLAMA, "tie_word_embeddings": True}),
    "mistral": llama.Config.from_hf({**LLAMA, "model_type": "mistral"}, scan=False),
    "gemma 3": gemma.Config.from_hf(GEMMA),
}


def drawn(config, seed=0):
    """Random numpy parameters."""
    shapes = hf.abstract(hf.family_of(config.to_hf(), "").Model(config))
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda s: draw(s.shape).astype(np.float32), shapes)


def layer_of(config, params, i):
    """The leaves of one layer."""
    if not config.scan:
        return params[f"layers_{i}"]
    return jax.tree.map(lambda leaf: leaf[i], params["layers"])


def side_by_side(x):
    """Puts the two of a rotary pair, half a head apart here, next to each other."""
    return np.stack([x[..., :3], x[..., 3:]], axis=-1).reshape(x.shape)


def maxtext_layer(config, layer):
    """Leaves of one layer under MaxText's names."""
    kernel = {name: part["kernel"] for name, part in layer.items() if "kernel" in part}
    scale = {name: part["scale"] for name, part in layer.items() if "scale" in part}
    found = {
        "mlp/wi_0/kernel": kernel["gate"],
        "mlp/wi_1/kernel": kernel["up"],
        "mlp/wo/kernel": kernel["down"],
        "self_attention/value/kernel": kernel["v"],
        "self_attention/out/kernel": kernel["o"],
    }
    if config.model_type == "gemma3_text":
        return found | {
            "self_attention/query/kernel": kernel["q"],
            "self_attention/key/kernel": kernel["k"],
            "self_attention/query_norm/scale": scale["norm_q"] + 1,
            "self_attention/key_norm/scale": scale["norm_k"] + 1,
            "pre_self_attention_norm/scale": scale["norm_attn"] + 1,
            "post_self_attention_norm/scale": scale["norm_attn_out"] + 1,
            "pre_ffw_norm/scale": scale["norm_mlp"] + 1,
            "post_ffw_norm/scale": scale["norm_mlp_out"] + 1,
        }
    turned = side_by_side if config.rope.kind == "llama3" else lambda x: x
    return found | {
        "self_attention/query/kernel": turned(kernel["q"]) / np.sqrt(6.0),
        "self_attention/key/kernel": turned(kernel["k"]),
        "pre_self_attention_layer_norm/scale": scale["norm_attn"],
        "post_self_attention_layer_norm/scale": scale["norm_mlp"],
    }


def stacks(config):
    """With scan_layers: the layers stored under each name."""
    if config.model_type != "gemma3_text":
        return {"layers": [0, 1, 2]}
    blocks = {f"layers/layers_{i}": [i] for i in range(6)}
    return blocks | {f"layers_remainder/layers_{i}": 6 + i for i in range(2)}


def maxtext_tree(config, params, scanned=True):
    """`{name: leaf}` under params/params."""
    embedding, norm = params["embed"]["embedding"], params["norm_out"]["scale"]
    if config.model_type == "gemma3_text":
        embedding, norm = embedding * np.float32(4.0), norm + 1  # sqrt(16)
    found = {"token_embedder/embedding": embedding, "decoder/decoder_norm/scale": norm}
    if not config.tied:
        found["decoder/logits_dense/kernel"] = params["head"]["kernel"]
    layers = [
        maxtext_layer(config, layer_of(config, params, i)) for i in range(config.layers)
    ]
    apart = {f"layers_{i}": i for i in range(config.layers)}
    for name, numbers in (stacks(config) if scanned else apart).items():
        for leaf in layers[0]:
            if isinstance(numbers, int):
                whole = layers[numbers][leaf]
            else:
                whole = np.stack([layers[i][leaf] for i in numbers], axis=1)
            found[f"decoder/{name}/{leaf}"] = whole
    return {name: np.asarray(leaf, np.float32) for name, leaf in found.items()}


def written(folder, leaves, **beside):
    """Like MaxText's `save_checkpoint`: Linen collections, in the items of step 0."""
    whole: dict = {"params": {"params": {}}, "step": 0, "opt_state": {}, **beside}
    for name, leaf in leaves.items():
        inner = whole["params"]["params"]
        *keys, last = name.split("/")
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    manager = ocp.CheckpointManager(folder, item_handlers={"items": handler})
    manager.save(0, args=ocp.args.Composite(items=ocp.args.PyTreeSave(whole)))
    manager.close()
    return folder / "0" / "items"


def raw(folder):
    """What Orbax reads, by name."""
    with ocp.PyTreeCheckpointer() as reader:
        return tree.flatten(reader.restore(folder)["params"]["params"])


def assert_same(found, want, atol=1e-6):
    assert found.keys() == want.keys()
    for name, leaf in want.items():
        np.testing.assert_allclose(found[name], leaf, atol=atol, err_msg=name)


APART = pytest.param(False, marks=pytest.mark.slow)


@pytest.mark.parametrize("scanned", [True, APART])
@pytest.mark.parametrize("name", MODELS)
def test_weights_both_ways(name, scanned, tmp_path):
    config = MODELS[name]
    params = drawn(config)
    leaves = maxtext_tree(config, params, scanned)
    moments = {"opt_state": {"mu": {"w": np.full(3, np.nan, np.float32)}}}  # not read
    folder = written(tmp_path / "theirs", leaves, **moments)
    found = maxtext.load(folder, config)
    assert_same(tree.flatten(found), tree.flatten(params))

    maxtext.save(tmp_path / "ours", config, found, scan_layers=scanned)
    assert_same(raw(tmp_path / "ours" / "0" / "items"), leaves)


def scores_of_maxtext(q, k):
    """q and k `[time, head_dim]` rotated as complex pairs of neighbours, unscaled."""
    turn = np.exp(1j * np.outer(np.arange(5), [1.0, 0.1, 0.01]))
    q, k = ((x[:, ::2] + 1j * x[:, 1::2]) * turn for x in (q, k))
    return (q @ k.conj().T).real


def scores_here(q, k):
    """Pairs half a head apart, scaled."""
    angle = np.outer(np.arange(5), [1.0, 0.1, 0.01])
    cos, sin = np.cos(angle), np.sin(angle)
    turn = lambda x: np.concatenate(
        [x[:, :3] * cos - x[:, 3:] * sin, x[:, 3:] * cos + x[:, :3] * sin], 1
    )
    return turn(q) @ turn(k).T / np.sqrt(6)


def test_the_scores_of_attention_are_the_same(tmp_path):
    config = MODELS["llama 3.1"]
    params = drawn(config)
    maxtext.save(tmp_path, config, params)
    theirs = raw(tmp_path / "0" / "items")
    x = np.random.default_rng(1).standard_normal((5, 16))
    layer = layer_of(config, params, 1)
    here = [x @ layer[name]["kernel"][:, 1] for name in "qk"]
    names = "query", "key"
    attention = "decoder/layers/self_attention"
    there = [x @ theirs[f"{attention}/{name}/kernel"][:, 1, 1] for name in names]
    found = scores_of_maxtext(*there)
    np.testing.assert_allclose(found, scores_here(*here), atol=1e-4)
    assert np.abs(found).max() > 1


def test_an_embedding_with_rows_of_padding(tmp_path):
    config = MODELS["gemma 3"]
    params = drawn(config)
    maxtext.save(tmp_path, config, params, vocabulary=32)
    embedding = raw(tmp_path / "0" / "items")["token_embedder/embedding"]
    assert embedding.shape == (32, 16) and not embedding[29:].any()
    found = maxtext.load(tmp_path / "0" / "items", config)
    assert_same(tree.flatten(found), tree.flatten(params))
    with pytest.raises(ValueError, match="vocabulary=28, but the model has 29 tokens"):
        maxtext.save(tmp_path / "no", config, params, vocabulary=28)


def test_shardings_and_the_checkpoints_dtype(tmp_path):
    config = llama.Config.from_hf(LLAMA, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), drawn(config))
    maxtext.save(tmp_path, config, params)
    devices = jax.devices()[-1:]
    mesh = lorax.sharding.make_mesh(devices=devices)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: place, params)
    found = maxtext.load(tmp_path / "0" / "items", config, shardings=shardings)
    for path, leaf in tree.flatten(found).items():
        assert leaf.devices() == {*devices} and leaf.dtype == jnp.bfloat16
        want = np.asarray(tree.flatten(params)[path], np.float32)
        np.testing.assert_allclose(np.asarray(leaf, np.float32), want, rtol=2**-7)


def lora_tree(config, leaves, modules, rank=2, seed=3):
    """qwix's leaves beside kernels, and the kernels plus their product; alpha = 5."""
    draw = np.random.default_rng(seed).standard_normal
    lora, moved = {}, dict(leaves)
    for name, leaf in leaves.items():
        if not name.endswith("/kernel") or not any(m in name for m in modules):
            continue
        stack = leaf.shape[1:2] if "decoder/layers/" in name else ()
        axes = leaf.shape[:1] + leaf.shape[1 + len(stack) :]
        inputs = 2 if name.endswith("out/kernel") else 1
        in_, out = np.prod(axes[:inputs]), np.prod(axes[inputs:])
        a = draw((in_, *stack, rank)).astype(np.float32)
        b = draw((rank, *stack, out)).astype(np.float32)
        lora[name + "_lora_a"], lora[name + "_lora_b"] = a, b
        product = np.einsum("ilr,rlo->ilo" if stack else "ir,ro->io", a, b)
        if stack:
            split = product.reshape(*axes[:inputs][:1], -1, *stack, out)
            product = np.moveaxis(split, 2, 1)
        moved[name] = leaf + 5 / rank * product.reshape(leaf.shape)
    return lora, moved


@pytest.mark.parametrize("scanned", [True, APART])
@pytest.mark.parametrize("name", ["llama 3.1", "mistral", "gemma 3"])
def test_lora_both_ways(name, scanned, tmp_path):
    """The factors add the same in MaxText's layout as here."""
    config = MODELS[name]
    params = drawn(config)
    leaves = maxtext_tree(config, params, scanned)
    modules = ["query", "key", "value", "out", "wi_0", "wo"]
    lora, moved = lora_tree(config, leaves, modules)
    want = maxtext.load(written(tmp_path / "moved", moved), config)
    found = maxtext.load_adapters(written(tmp_path / "lora", lora), config, alpha=5)
    assert {type(a) for a in found.values()} == {lorax.Lora}
    merged = lorax.merge(found, params)
    assert_same(tree.flatten(merged), tree.flatten(want), atol=1e-4)

    rule = maxtext.save_adapters(tmp_path / "own", config, found, scan_layers=scanned)
    assert rule.rank == 2 and rule.alpha == 5
    assert_same(raw(tmp_path / "own" / "0" / "items"), lora, atol=1e-5)
    told = json.loads((tmp_path / "own" / "0" / "_CHECKPOINT_METADATA").read_text())
    assert told["custom_metadata"]["scan_layers"] == scanned
    assert told["custom_metadata"]["lora"]["lora_alpha"] == 5
    layer = "decoder/layers" if scanned else "decoder/layers_2"
    assert tree.match(rule.module_path, f"{layer}/self_attention/query")
    assert not tree.match(rule.module_path, f"{layer}/mlp/wi_1")


def test_nnx_trees_and_lora_that_maxtext_converted(tmp_path):
    """Variables' values one key deeper, numbered lists, other collections or none."""
    config = MODELS["mistral"]
    leaves = maxtext_tree(config, drawn(config), scanned=False)
    lora, _ = lora_tree(config, leaves, ["wi_0"])
    deeper = {f"{name}/value": leaf for name, leaf in lora.items()}
    want = maxtext.load_adapters(written(tmp_path / "plain", lora), config, alpha=5)
    found = maxtext.load_adapters(written(tmp_path / "value", deeper), config, alpha=5)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    bare: dict = {"base": {"decoder": {"layers": {}}}, "rngs": {"count": np.zeros(1)}}
    for name, leaf in lora.items():
        _, layer, mlp, wi, last = name.split("/")
        number = bare["base"]["decoder"]["layers"].setdefault(
            layer[-1], {mlp: {wi: {}}}
        )
        number[mlp][wi][last] = {"value": leaf}
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "bare", bare)
    found = maxtext.load_adapters(tmp_path / "bare", config, alpha=5)
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_adapters_of_some_layers_and_of_several_ranks(tmp_path):
    config = MODELS["llama 3.1"]
    params = drawn(config)
    apply = llama.Model(config).apply
    forward = lambda params: apply({"params": params}, jnp.zeros((1, 2), int))
    kernels = lorax.discover(forward, params)
    targets = [
        lorax.Target("layers/q/kernel", rank=3, alpha=9, layers=(0, 2)),
        lorax.Target("layers/up/kernel", rank=1, alpha=2),
    ]
    adapters, _ = lorax.init(jax.random.key(0), params, targets, kernels)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    rule = maxtext.save_adapters(tmp_path, config, adapters)
    assert rule.rank == 3
    query = raw(tmp_path / "0" / "items")[
        "decoder/layers/self_attention/query/kernel_lora_b"
    ]
    assert query[:, [0, 2]].any() and not query[:, 1].any()
    found = maxtext.load_adapters(tmp_path / "0" / "items", config, alpha=rule.alpha)
    merged = [tree.flatten(lorax.merge(a, params)) for a in (found, adapters)]
    assert_same(*merged, atol=1e-5)


def test_what_is_refused(tmp_path):
    config = MODELS["gemma 3"]
    leaves = maxtext_tree(config, drawn(config))
    folder = written(tmp_path / "whole", leaves)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        maxtext.load(tmp_path / "nowhere", config)
    with pytest.raises(ValueError, match="give the folder of the tree itself.*items"):
        maxtext.load(tmp_path / "whole" / "0", config)
    with pytest.raises(ValueError, match="with 7 layers; missing: .*left over: .*_1"):
        maxtext.load(folder, gemma.Config.from_hf({**GEMMA, "num_hidden_layers": 7}))
    wide = gemma.Config.from_hf({**GEMMA, "intermediate_size": 20})
    with pytest.raises(ValueError, match=r"wi_0/kernel' has shape \(16, 1, 24\).*20\)"):
        maxtext.load(folder, wide)
    more = gemma.Config.from_hf({**GEMMA, "vocab_size": 30})
    with pytest.raises(ValueError, match=r"embedding' has shape \(29, 16\).*\(30,"):
        maxtext.load(folder, more)
    other = gemma.Config.from_hf({**GEMMA, "layer_types": ["full_attention"] * 8})
    with pytest.raises(ValueError, match="five layers with a window and then one with"):
        maxtext.load(folder, other)
    old = gemma.Config.from_hf({**GEMMA, "model_type": "gemma2"})
    with pytest.raises(
        ValueError, match="'gemma2': MaxText's layout is known here only for"
    ):
        maxtext.save(tmp_path / "no", old, {})
    biased = llama.Config.from_hf({**LLAMA, "attention_bias": True})
    with pytest.raises(ValueError, match="'llama' and this model differ in .*bias"):
        maxtext.load(folder, biased)
    broken = leaves | {"decoder/decoder_norm/scale": np.full(16, np.nan, np.float32)}
    with pytest.raises(ValueError, match="decoder_norm/scale' holds NaN or infinity"):
        maxtext.load(written(tmp_path / "nan", broken), config)
    with pytest.raises(ValueError, match="not the parameters of the model: layers/nor"):
        params = drawn(config)
        del params["layers"]["norm_q"]
        maxtext.save(tmp_path / "no", config, params)


def test_lora_that_is_refused(tmp_path):
    config = MODELS["llama 3.1"]
    params = drawn(config)
    leaves = maxtext_tree(config, params)
    lora, _ = lora_tree(config, leaves, ["wi_0"])
    a, b = (
        "decoder/layers/mlp/wi_0/kernel_lora_a",
        "decoder/layers/mlp/wi_0/kernel_lora_b",
    )

    def refused(name, tree, message):
        with pytest.raises(ValueError, match=message):
            maxtext.load_adapters(written(tmp_path / name, tree), config, alpha=5)

    refused("one", {a: lora[a]}, "kernel_lora_b' is missing, the other of a pair")
    refused("base", leaves, "leaves that are not LoRA parameters")
    refused("axis", {a: lora[a], b: np.moveaxis(lora[b], 1, 0)}, r"\(3, 2, 24\), but")
    head = {n.replace("layers/mlp/wi_0", "logits_dense"): x for n, x in lora.items()}
    refused("head", head, "'decoder/logits_dense' is not a linear map in a layer")
    kernels = lorax.discover(
        lambda p: llama.Model(config).apply({"params": p}, jnp.zeros((1, 2), int)),
        params,
    )
    make = lambda target: lorax.init(jax.random.key(0), params, [target], kernels)[0]
    with pytest.raises(ValueError, match="MaxText stores only LoRA, and this is Dora"):
        dora = make(lorax.Target("layers/q/kernel", rank=2, adapter="dora"))
        maxtext.save_adapters(tmp_path / "no", config, dora)
    with pytest.raises(ValueError, match="'lm_head' is not a linear map in a layer"):
        head = make(lorax.Target("head/kernel", rank=2))
        maxtext.save_adapters(tmp_path / "no", config, head)
    with pytest.raises(ValueError, match="there are no adapters to write"):
        maxtext.save_adapters(tmp_path / "no", config, {})
    made = make(lorax.Target("layers/q/kernel", rank=2))
    maxtext.save_adapters(tmp_path / "yes", config, made)
    with pytest.raises(ValueError, match="already has a step 0; give another folder"):
        maxtext.save_adapters(tmp_path / "yes", config, made)
