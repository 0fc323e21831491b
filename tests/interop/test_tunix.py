"""tunix's LoRA: modules with its names and einsums, qwix factors, Orbax files.

The modules are those of tunix/models/{llama3,gemma3}/model.py, reduced to each layer's
linear maps, which is all that LoRA adapts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import lorax
from lorax import tree
from lorax.interop import hf, orbax_trees
from lorax.models import gemma, llama

pytestmark = pytest.mark.once
qwix = pytest.importorskip("qwix", reason="needs the golden extra")
ours = pytest.importorskip("lorax.interop.tunix")

SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
GEMMA = SIZES | {"model_type": "gemma3_text", "sliding_window": 4}
CONFIGS = {
    "llama": llama.Config.from_hf(SIZES | {"model_type": "llama"}),
    "gemma": gemma.Config.from_hf(GEMMA),
    "fused": gemma.Config.from_hf(GEMMA | {"num_key_value_heads": 4}, scan=False),
}
RANK, ALPHA = 2, 5.0


class Einsum(nnx.Module):
    def __init__(self, text, shape):
        self.text, self.w = text, nnx.Param(jnp.zeros(shape))

    def __call__(self, x):
        return jnp.einsum(self.text, x, self.w[...])


class Maps(nnx.Module):
    """Every linear map on an input of ones; the outputs by name."""

    def __init__(self, parts):
        for name, part in parts.items():
            setattr(self, name, part)
        self.names = tuple(parts)

    def __call__(self, inputs):
        return {name: getattr(self, name)(inputs[name]) for name in self.names}


class Layer(nnx.Module):
    def __init__(self, kind, rngs):
        if kind == "llama":
            attention = {
                "q_proj": Einsum("BTD,DNH->BTNH", (16, 4, 6)),
                "k_proj": Einsum("BSD,DKH->BSKH", (16, 2, 6)),
                "v_proj": Einsum("BSD,DKH->BSKH", (16, 2, 6)),
                "o_proj": Einsum("BTNH,NHD->BTD", (4, 6, 16)),
            }
        else:
            attention = {"attn_vec_einsum": Einsum("BTNH,NHD->BTD", (4, 6, 16))}
            if kind == "fused":
                own = Einsum("BTD,SNDH->SBTNH", (3, 4, 16, 6))
                attention["qkv_einsum"] = own
            else:
                attention["q_einsum"] = Einsum("BTD,NDH->BTNH", (4, 16, 6))
                attention["kv_einsum"] = Einsum("BSD,CKDH->CBSKH", (2, 2, 16, 6))
        zero = {"use_bias": False, "kernel_init": nnx.initializers.zeros}
        linear = lambda n, m: nnx.Linear(n, m, rngs=rngs, **zero)
        mlp = {"gate_proj": (16, 24), "up_proj": (16, 24), "down_proj": (24, 16)}
        self.attn = Maps(attention)
        self.mlp = Maps({name: linear(*sizes) for name, sizes in mlp.items()})

    def __call__(self, inputs):
        return {**self.attn(inputs), **self.mlp(inputs)}


class Model(nnx.Module):
    def __init__(self, kind, rngs):
        self.layers = nnx.List([Layer(kind, rngs) for _ in range(2)])
        if kind == "llama":
            self.lm_head = Einsum("BTD,DV->BTV", (16, 29))

    def __call__(self, inputs):
        found = {f"{i}": layer(inputs) for i, layer in enumerate(self.layers)}
        return found | ({"head": self.lm_head(inputs["x"])} if "x" in inputs else {})


def inputs_of(kind):
    draw = np.random.default_rng(0).standard_normal
    x = jnp.asarray(draw((2, 3, 16)), jnp.float32)
    heads = jnp.asarray(draw((2, 3, 4, 6)), jnp.float32)
    wide = jnp.asarray(draw((2, 3, 24)), jnp.float32)
    names = ("q_proj", "k_proj", "v_proj", "q_einsum", "kv_einsum", "qkv_einsum")
    found = dict.fromkeys((*names, "gate_proj", "up_proj"), x)
    found |= {"o_proj": heads, "attn_vec_einsum": heads, "down_proj": wide}
    return found | ({"x": x} if kind == "llama" else {})


def made(kind, rule):
    """The model with qwix's LoRA, all factors random and all weights zero."""
    provider = qwix.LoraProvider(**rule._asdict())
    inputs = inputs_of(kind)
    model = Model(kind, nnx.Rngs(0))
    model = qwix.apply_lora_to_model(model, provider, inputs, rngs=nnx.Rngs(1))
    draw = np.random.default_rng(1).standard_normal
    state = nnx.state(model, nnx.LoRAParam)
    drawn = lambda leaf: jnp.asarray(draw(leaf.shape), jnp.float32)
    nnx.update(model, jax.tree.map(drawn, state))
    return model


EVERY = orbax_trees.Rule(".*", RANK, ALPHA)


def updates(config, adapters):
    """What the adapters add to each kernel, by name and layer."""
    shapes = hf.abstract(hf.family_of(config.to_hf(), "").Model(config))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    merged = lorax.merge(adapters, zeros)
    layer = lambda i: (
        jax.tree.map(lambda x: x[i], merged["layers"])
        if config.scan
        else merged[f"layers_{i}"]
    )
    own = [
        {n: part["kernel"] for n, part in layer(i).items() if "kernel" in part}
        for i in range(2)
    ]
    return own, merged.get("head", {}).get("kernel")


def here(config, adapters, inputs):
    """The same outputs from our kernels."""
    layers, head = updates(config, adapters)
    x, heads = inputs["q_proj"], inputs["o_proj"]
    found = {}
    for i, kernel in enumerate(layers):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, kernel[n]) for n in "qkv")
        o = jnp.einsum("btnh,nhd->btd", heads, kernel["o"])
        found[f"{i}"] = {
            "q_proj": q,
            "k_proj": k,
            "v_proj": v,
            "o_proj": o,
            "q_einsum": q,
            "attn_vec_einsum": o,
            "gate_proj": x @ kernel["gate"],
            "up_proj": x @ kernel["up"],
            "down_proj": inputs["down_proj"] @ kernel["down"],
        }
        if k.shape == v.shape:
            found[f"{i}"]["kv_einsum"] = jnp.stack([k, v])
        if q.shape == k.shape:
            found[f"{i}"]["qkv_einsum"] = jnp.stack([q, k, v])
    return found | ({} if head is None else {"head": x @ head})


def compare(theirs, own):
    for i in ("0", "1"):
        for name, want in theirs[i].items():
            assert np.abs(want).max() > 0.1, name
            np.testing.assert_allclose(own[i][name], want, atol=1e-4, err_msg=name)
    if "head" in theirs:
        np.testing.assert_allclose(own["head"], theirs["head"], atol=1e-4)


def saved(model, folder, kind=nnx.LoRAParam):
    """Saves like tunix's CheckpointManager.save(save_only_lora_params=True)."""
    checkpointer = ocp.training.Checkpointer(folder)
    checkpointer.save_checkpointables(7, {"model_params": nnx.state(model, kind)})
    checkpointer.close()
    return folder / "7" / "model_params"


def restored(model, folder):
    """Restores like its maybe_restore(restore_only_lora_params=True)."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    checkpointer = ocp.training.Checkpointer(folder)
    want = {"model_params": nnx.state(model, nnx.LoRAParam)}
    with context:
        found = checkpointer.load_checkpointables(checkpointer.latest.step, want)
    checkpointer.close()
    nnx.update(model, found["model_params"])
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_ways(kind, tmp_path):
    config, inputs = CONFIGS[kind], inputs_of(kind)
    model = made(kind, EVERY)
    theirs = model(inputs)
    adapters = ours.load_adapters(saved(model, tmp_path / "t"), config, alpha=ALPHA)
    assert {a.rank for a in adapters.values()} == {RANK}
    compare(theirs, here(config, adapters, inputs))

    rule = ours.save_adapters(tmp_path / "own", config, adapters)
    assert rule.rank == RANK and rule.alpha == ALPHA  # they still share a
    fresh = restored(made(kind, rule), tmp_path / "own")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        *(nnx.to_pure_dict(nnx.state(m, nnx.LoRAParam)) for m in (fresh, model)),
    )


@pytest.mark.parametrize(
    "kind", ["gemma", pytest.param("fused", marks=pytest.mark.slow)]
)
def test_keys_and_values_that_do_not_share_a(kind, tmp_path):
    """Written side by side; all modules get the rank that the widest one needs."""
    config, inputs = CONFIGS[kind], inputs_of(kind)
    family = gemma.Model(config)
    params = jax.tree.map(lambda s: jnp.ones(s.shape), hf.abstract(family))
    call = lambda params: family.apply({"params": params}, jnp.zeros((1, 2), int))
    target = lorax.Target(".*/(q|k|v|o|up)/kernel", rank=2, alpha=3)
    kernels = lorax.discover(call, params)
    adapters, _ = lorax.init(jax.random.key(0), params, target, kernels)
    draw = np.random.default_rng(5).standard_normal
    adapters = jax.tree.map(lambda x: x + draw(x.shape).astype("f"), adapters)
    rule = ours.save_adapters(tmp_path, config, adapters)
    parts = 3 if kind == "fused" else 2
    assert rule.rank == 2 * parts and rule.alpha == 3 * parts
    assert tree.match(rule.module_path, "layers/1/mlp/up_proj")
    assert not tree.match(rule.module_path, "layers/1/mlp/gate_proj")
    model = restored(made(kind, rule), tmp_path)
    found = {
        i: {n: y for n, y in own.items() if n not in ("gate_proj", "down_proj")}
        for i, own in model(inputs).items()
    }
    compare(found, here(config, adapters, inputs))
    again = ours.load_adapters(
        tmp_path / "0" / "model_params", config, alpha=rule.alpha
    )
    compare(found, here(config, again, inputs))


def test_what_is_refused(tmp_path):
    config = CONFIGS["gemma"]
    model = made("gemma", EVERY)
    whole = saved(model, tmp_path / "whole", nnx.Param)
    with pytest.raises(
        ValueError, match="leaves that are not LoRA parameters .*LoRA parameters"
    ):
        ours.load_adapters(whole, config, alpha=1)
    lora = saved(model, tmp_path / "lora")
    with pytest.raises(KeyError, match="llama has no leaf 'layers_0/attn/attn_vec_ein"):
        ours.load_adapters(lora, CONFIGS["llama"], alpha=1)
    wide = gemma.Config.from_hf({**GEMMA, "intermediate_size": 20})
    with pytest.raises(
        ValueError, match=r"down_proj/kernel_lora_a' has shape \(24, 2\)"
    ):
        ours.load_adapters(lora, wide, alpha=1)
    with pytest.raises(ValueError, match="alpha"):
        ours.load_adapters(lora, config, alpha=float("nan"))
    mixture = lorax.models.mixture.Config(model_type="mixtral")
    with pytest.raises(
        ValueError, match="'mixtral': tunix's layout is known here only for"
    ):
        ours.load_adapters(lora, mixture, alpha=1)
    adapters = ours.load_adapters(lora, config, alpha=1)
    one = adapters["layers/q/kernel"]
    table = one.replace(
        a=jnp.ones((29, 2)), b=jnp.ones((2, 16)), axes=lorax.Axes((0,), (1,))
    )
    with pytest.raises(
        ValueError, match="has no weight of its own in tunix's gemma3_te"
    ):
        ours.save_adapters(tmp_path / "no", config, {"embed/embedding": table})
