"""Gemma 4 against transformers: every switch, cache, padding, packing, PEFT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax import losses
from lorax.interop import hf, peft
from lorax.models import gemma4, rope
from tests.models import golden

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")
if not hasattr(transformers, "Gemma4ForCausalLM"):
    pytest.skip("transformers lacks Gemma 4", allow_module_level=True)

NEAR, FAR = "sliding_attention", "full_attention"
SIZES = {
    "vocab_size": 61,
    "vocab_size_per_layer_input": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 6,
    "rms_norm_eps": 1e-2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
ROPES = {
    FAR: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.5,
        "rope_theta": 500.0,
        "factor": 2.0,
    },
    NEAR: {"rope_type": "default", "rope_theta": 50.0},
}
CASES = {
    "e2b": {
        "num_hidden_layers": 6,
        "layer_types": [NEAR, FAR] * 3,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 4,
        "rope_parameters": ROPES,
    },
    "31b": {
        "num_hidden_layers": 6,
        "layer_types": [NEAR, NEAR, FAR] * 2,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 2.0,
    },
    "biases": {
        "num_hidden_layers": 3,
        "layer_types": [NEAR, NEAR, FAR],
        "hidden_size_per_layer_input": 0,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
}


def redrawn(model):
    golden.redraw(model, size=2.0)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.layer_scalar.fill_(0.8 + 0.1 * i)  # a buffer, which is not redrawn
            layer.self_attn.q_norm.weight *= 0.3  # other models scale scores instead
    return model


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Makes each case's model once: directory, model, tokens and reference logits."""
    made = {}

    def make(name):
        if name not in made:
            config = transformers.Gemma4TextConfig(**SIZES, **CASES[name])
            model = redrawn(transformers.Gemma4ForCausalLM(config))
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            tokens = golden.tokens_of(61, time=24)  # beyond the windows
            made[name] = directory, model, tokens, golden.reference(model, tokens)
        return made[name]

    return make


def apply(model, params, tokens, **kwargs):
    return jax.jit(lambda p: model.apply({"params": p}, tokens, **kwargs))(params)


@pytest.mark.parametrize(
    "name, scan", [("e2b", True), ("e2b", False), ("31b", True), ("biases", True)]
)
def test_logits_are_those_of_transformers(case, name, scan, tmp_path):
    directory, _, tokens, expected = case(name)
    model, params = hf.load(directory, scan=scan)
    golden.assert_close(apply(model, params, tokens), expected)
    written = gemma4.Config.from_hf(model.config.to_hf(), scan=scan)
    assert written == model.config
    hf.save(tmp_path / "again", model.config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager", dtype=torch.float64
    )
    golden.assert_close(golden.reference(theirs.eval(), tokens), expected)


def test_periods_are_stacked(case):
    model, params = hf.load(case("e2b")[0])
    assert model.config.stacks == {"layers": 2, "sharing": 1}
    shapes = {path: leaf.shape for path, leaf in lorax.tree.flatten(params).items()}
    assert shapes["layers/at_0/q/kernel"] == (2, 16, 4, 8)
    assert shapes["layers/at_1/k/kernel"] == (2, 16, 2, 16)
    assert shapes["sharing/at_1/gate/kernel"] == (1, 16, 48)
    assert "sharing/at_0/k/kernel" not in shapes


TURNED = rope.Rope(base=77.0)
MUTATIONS = {
    "eps": ("31b", {"eps": 1e-6}),
    "rope": ("31b", {"rope": TURNED}),
    "local rope": ("31b", {"local_rope": TURNED}),
    "activation": ("31b", {"activation": "silu"}),
    "logit_cap": ("31b", {"logit_cap": None}),
    "windows": ("31b", {"windows": (7, 7, 0) * 2}),
    "qkv_bias": ("biases", {"qkv_bias": False}),
    "extra": ("e2b", {"extra": 0}),
    "part": ("e2b", {"rope": rope.Rope(500.0, "proportional", 2.0, part=0.25)}),
    "factor": ("e2b", {"rope": rope.Rope(500.0, "proportional", part=0.5)}),
}


@pytest.mark.once
@pytest.mark.parametrize("name", MUTATIONS)
def test_every_switch_matters(case, name):
    base, changed = MUTATIONS[name]
    directory, _, tokens, expected = case(base)
    model, params = hf.load(directory, scan=False)
    assert all(getattr(model.config, k) != v for k, v in changed.items())
    mutant = gemma4.Model(dataclasses.replace(model.config, **changed))
    found = mutant.apply({"params": params}, tokens[:1])
    golden.assert_apart(found, expected[:1])


def test_the_scalar_of_a_layer_matters(case):
    directory, _, tokens, expected = case("31b")
    model, params = hf.load(directory)
    at = {**params["layers"]["at_1"], "scalar": jnp.ones((2, 1))}
    params = {**params, "layers": {**params["layers"], "at_1": at}}
    golden.assert_apart(apply(model, params, tokens), expected)


@pytest.mark.parametrize("name, scan", [("e2b", True), ("31b", False)])
def test_left_padding_and_cache(case, name, scan):
    directory, reference, tokens, _ = case(name)
    real = golden.left_padded([24, 15], 24)
    expected = np.zeros((2, 24, 61))
    for row, length in enumerate([24, 15]):
        own = tokens[row : row + 1, 24 - length :]
        expected[row, 24 - length :] = golden.reference(reference, own)[0]
    model, params = hf.load(directory, scan=scan)
    golden.assert_close(apply(model, params, tokens, real=real), expected, real)
    golden.assert_close(golden.cached(model, params, tokens, real), expected, real)


def test_a_cache_in_another_order(case):
    directory, _, tokens, expected = case("e2b")
    model, params = hf.load(directory)
    _, cache = apply(model, params, tokens[:, :-1], cache=model.cache(2, 24))
    cache = cache.rows(jnp.array([1, 0]))
    found, _ = apply(model, params, tokens[::-1, -1:], cache=cache)
    golden.assert_close(found[::-1], expected[:, -1:])


@pytest.mark.parametrize("name", ["e2b", "31b"])
def test_packed_documents_and_attention_in_chunks(case, name):
    directory, reference, tokens, _ = case(name)
    model, params = hf.load(directory, attention="lean")
    segments = np.repeat([[0, 1]], [9, 15], axis=1)
    positions = np.concatenate([np.arange(9), np.arange(15)])[None]
    packed = apply(model, params, tokens[:1], segments=segments, positions=positions)
    alone = golden.reference(reference, tokens[:1, 9:])
    golden.assert_close(packed[:, 9:], alone)


def test_the_loss_from_hidden_states_has_the_cap(case):
    directory, _, tokens, expected = case("31b")
    model, params = hf.load(directory)
    hidden = apply(model, params, tokens[:, :-1], hidden=True)
    found = losses.chunked_cross_entropy(
        hidden, model.head_of(params), jnp.asarray(tokens[:, 1:]), chunk=16
    )
    wide = expected[:, :-1]
    nll = np.log(np.exp(wide).sum(-1))
    nll -= np.take_along_axis(wide, tokens[:, 1:, None], -1)[..., 0]
    assert float(found.mean) == pytest.approx(nll.mean(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "save=k,v,extra_gate"])
def test_remat_changes_no_gradient(case, remat):
    directory, _, tokens, _ = case("e2b")
    model, params = hf.load(directory)

    def slope(remat):
        own = gemma4.Model(dataclasses.replace(model.config, remat=remat))

        def loss(params):
            return jnp.mean(own.apply({"params": params}, tokens[:, :8]) ** 2)

        return jax.jit(jax.grad(loss))(params)

    for a, b in zip(
        jax.tree.leaves(slope("none")), jax.tree.leaves(slope(remat)), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize(
    "name, leaves", [pytest.param("e2b", 33, marks=pytest.mark.slow), ("31b", 20)]
)
def test_adapters_are_those_of_peft(case, name, leaves, tmp_path):
    theirs = pytest.importorskip("peft", reason="needs the golden extra")
    directory, _, tokens, plain = case(name)
    model, params = hf.load(directory)

    def call(params):
        return model.apply({"params": params}, tokens)

    target = lorax.Target("all-linear", rank=3, alpha=6.0)
    made, _ = lorax.init(
        jax.random.key(0), params, target, lorax.discover(call, params)
    )
    assert len(made) == leaves
    made = jax.tree.map(lambda x: x + 0.05, made)
    found = jax.jit(lorax.adapt(call, on_merge="error"))(made, params)
    peft.save(tmp_path / "own", made, model.config)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager"
    )
    adapted = theirs.PeftModel.from_pretrained(base, tmp_path / "own").eval()
    expected = golden.reference(adapted, tokens)
    golden.assert_close(found, expected)
    golden.assert_apart(plain, expected)
    adapted.save_pretrained(tmp_path / "theirs")
    again = peft.load(tmp_path / "theirs", model.config, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, made)


def test_an_adapter_of_the_layers_embedding_is_that_of_peft(case, tmp_path):
    theirs = pytest.importorskip("peft", reason="needs the golden extra")
    directory, _, tokens, plain = case("e2b")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager"
    )
    torch.manual_seed(0)
    fields = {"r": 2, "lora_alpha": 1, "init_lora_weights": False}
    config = theirs.LoraConfig(target_modules=["embed_tokens_per_layer"], **fields)
    adapted = theirs.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path)
    model, params = hf.load(directory)
    made = peft.load(tmp_path, model.config, params)
    found = apply(model, lorax.merge(made, params), tokens)
    expected = golden.reference(adapted, tokens)
    golden.assert_close(found, expected)
    golden.assert_apart(plain, expected)


def told(**fields):
    sizes = {k: v for k, v in SIZES.items() if k != "attn_implementation"}
    kinds = [NEAR, FAR, NEAR, FAR]
    sizes |= {"num_hidden_layers": 4, "layer_types": kinds}
    return {**sizes, "model_type": "gemma4_text", **fields}


EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2}


@pytest.mark.parametrize(
    "fields, message",
    [
        (EXPERTS, "enable_moe_block=True is not implemented for gemma4_text"),
        ({"head_dim": 15}, "head_dim=15; rotary positions need an even size"),
        ({"global_head_dim": 15}, "global_head_dim=15; rotary positions need"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers.*<= 3"),
        ({"num_kv_shared_layers": 3}, "is of the kind 'full_attention', whose keys"),
        ({"layer_types": [NEAR]}, "1 entries for num_hidden_layers=4"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "one table for each of full"),
        ({"rope_parameters": {**ROPES, NEAR: None}}, "sliding_attention lacks rope_t"),
        ({"rope_parameters": {**ROPES, FAR: {"rope_theta": 5.0}}}, "lacks rope_type"),
        ({"per_layer_config": {"1": {"head_dim": 16}}}, "all layers that see all"),
        (
            {"per_layer_config": {"0": {"head_dim": 16}}},
            "per_layer_config.0: only head_dim",
        ),
        ({"per_layer_config": {"9": {"head_dim": 16}}}, r"no other layers.*\['9'\]"),
        ({"altup": True}, "unknown fields.*altup"),
    ],
)
def test_what_is_not_implemented_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        gemma4.Config.from_hf(told(**fields))


def test_a_config_without_windows_is_refused():
    with pytest.raises(ValueError, match="give each of the 2 layers a window"):
        gemma4.Config(layers=2, windows=())


def test_the_two_spellings_of_the_heads():
    heads = {"head_dim": 16, "num_key_value_heads": 1}
    spelled = {"per_layer_config": {"1": heads, "3": heads}, "global_head_dim": None}
    found = gemma4.Config.from_hf(told(attention_k_eq_v=True, **spelled))
    older = told(attention_k_eq_v=True, num_global_key_value_heads=1)
    assert found == gemma4.Config.from_hf(older)
    assert found.heads_of(0) == (1, 16) and found.heads_of(6) == (2, 8)


def test_the_last_layer_sees_all():
    """As in transformers, with a warning, for a pattern that ends in a window."""
    found = gemma4.Config.from_hf(told(num_hidden_layers=8, layer_types=None))
    assert found.windows == (6, 6, 6, 6, 6, 0, 6, 0)
    assert found.period("layers") == found.windows and found.stacks == {"layers": 1}


def test_keys_of_layers_that_have_none_may_lie_in_the_file(case, tmp_path):
    """Checkpoints on the hub contain them; transformers drops them too."""
    directory, _, tokens, expected = case("e2b")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors["model.layers.4.self_attn.k_proj.weight"] = np.ones((16, 16), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    model, params = hf.load(tmp_path)
    golden.assert_close(apply(model, params, tokens), expected)
    del tensors["model.layers.3.self_attn.k_proj.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing: model.layers.3.self_attn.k_proj"):
        hf.load(tmp_path)
