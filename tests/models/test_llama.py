"""The Llama family against transformers: every switch, cache, padding, packing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.interop import hf, peft
from lorax.models import llama
from tests.models import golden

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
}
SHORT = [1.0, 1.3, 1.9]
LONG = [1.0, 2.5, 6.0]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": SHORT,
    "long_factor": LONG,
    "partial_rotary_factor": 0.75,
}
PHI3 = {
    "rope_parameters": LONGROPE,
    "original_max_position_embeddings": 24,
    "pad_token_id": 0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
PARTIAL = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-2}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "linear": ("Llama", {"rope_parameters": LINEAR, "hidden_act": "gelu"}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {**PHI3, "sliding_window": 7}),
    "phi3-plain": ("Phi3", {"pad_token_id": 0, "rope_parameters": PARTIAL}),
    "smollm3": (
        "SmolLM3",
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
            "pad_token_id": 0,
        },
    ),
    "olmo2": ("Olmo2", {"attention_bias": True, "pad_token_id": 0}),
    "ministral": (
        "Ministral",
        {"layer_types": MIXED, "sliding_window": 6, "head_dim": 8},
    ),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Makes each case's model once: directory, tokens and reference logits."""
    made = {}

    def make(name):
        if name not in made:
            kind, fields = CASES[name]
            config = getattr(transformers, f"{kind}Config")(**{**SIZES, **fields})
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            golden.redraw(model, size=2.0)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            tokens = golden.tokens_of(61, time=40)  # beyond window and original length
            made[name] = directory, model, tokens, golden.reference(model, tokens)
        return made[name]

    return make


def apply(model, params, tokens, **kwargs):
    return jax.jit(lambda p: model.apply({"params": p}, tokens, **kwargs))(params)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(case, name):
    directory, _, tokens, expected = case(name)
    model, params = hf.load(directory)
    golden.assert_close(apply(model, params, tokens), expected)
    written = model.config.to_hf()
    assert llama.Config.from_hf(written) == model.config


Rope = llama.rope.Rope


def phi3_rope(**changed):
    own = {"short": tuple(SHORT), "long": tuple(LONG), "part": 0.75, "original": 24}
    return Rope(500.0, "longrope", 64 / 24, **{**own, **changed})


MUTATIONS = {
    "eps": ("llama", {"eps": 1e-6}),
    "heads share": ("llama", {"rope": llama.rope.Rope(base=20_000.0)}),
    "activation": ("llama", {"activation": "gelu"}),
    "qkv_bias": ("llama-biases", {"qkv_bias": False}),
    "o_bias": ("llama-biases", {"o_bias": False}),
    "mlp_bias": ("llama-biases", {"mlp_bias": False}),
    "llama3": ("llama3", {"rope": llama.rope.Rope(base=500.0)}),
    "linear": ("linear", {"rope": llama.rope.Rope(base=500.0)}),
    "yarn": ("yarn", {"rope": llama.rope.Rope(base=500.0)}),
    "window": ("mistral", {"windows": ()}),
    "window + 1": ("mistral", {"windows": (6, 6, 6)}),
    "windowed layers": ("qwen2-window", {"windows": (6, 6, 6)}),
    "qwen2 biases": ("qwen2", {"qkv_bias": False}),
    "qk_norm": ("qwen3", {"qk_norm": False}),
    "phi3's window": ("phi3", {"windows": (8, 8, 8)}),
    "longrope": ("phi3", {"rope": Rope(500.0, part=0.75)}),
    "longrope's long factors": ("phi3", {"rope": phi3_rope(long=tuple(SHORT))}),
    "longrope's gain": ("phi3", {"rope": phi3_rope(attention=1.0)}),
    "longrope's original": ("phi3", {"rope": phi3_rope(original=48)}),
    "part": ("phi3-plain", {"rope": Rope(50.0)}),
    "turned": ("smollm3", {"turned": ()}),
    "smollm3's windows": ("smollm3", {"windows": ()}),
    "smollm3's biases": ("smollm3", {"qkv_bias": False}),
    "olmo2's qk_norm": ("olmo2", {"qk_norm": False}),
    "post_norms": ("olmo2", {"post_norms": False}),
    "ministral's windows": ("ministral", {"windows": (6, 6, 6)}),
}


@pytest.mark.once
@pytest.mark.parametrize("name", MUTATIONS)
def test_every_switch_matters(case, name):
    base, changed = MUTATIONS[name]
    directory, _, tokens, expected = case(base)
    model, params = hf.load(directory)
    assert all(getattr(model.config, k) != v for k, v in changed.items())
    mutant = llama.Model(dataclasses.replace(model.config, **changed))
    golden.assert_apart(apply(mutant, params, tokens), expected)


def test_yarn_gain_matters_by_itself(case):
    directory, _, tokens, expected = case("yarn")
    model, params = hf.load(directory)
    rope = dataclasses.replace(model.config.rope, attention=1.0)
    mutant = llama.Model(dataclasses.replace(model.config, rope=rope))
    golden.assert_apart(apply(mutant, params, tokens), expected)


def test_an_untied_head_is_its_own(case):
    directory, _, tokens, expected = case("llama-tied")
    model, params = hf.load(directory)
    mutant = llama.Model(dataclasses.replace(model.config, tied=False))
    head = {"kernel": jnp.roll(params["embed"]["embedding"].T, 1, axis=1)}
    golden.assert_apart(apply(mutant, {**params, "head": head}, tokens), expected)


@pytest.mark.parametrize(
    "name, scan",
    [
        ("qwen2-window", True),
        ("qwen2-window", False),
        ("phi3", True),
        ("smollm3", True),
        ("ministral", True),
        pytest.param("olmo2", True, marks=pytest.mark.slow),
    ],
)
def test_left_padding_and_cache(case, name, scan):
    directory, reference, tokens, _ = case(name)
    real = golden.left_padded([40, 23], 40)
    positions = np.maximum(real.cumsum(1) - 1, 0)
    expected = golden.reference(reference, tokens, real, positions)
    model, params = hf.load(directory, scan=scan)
    golden.assert_close(apply(model, params, tokens, real=real), expected, real)
    golden.assert_close(golden.cached(model, params, tokens, real), expected, real)


def test_packed_documents_do_not_see_each_other(case):
    directory, reference, tokens, _ = case("mistral")
    model, params = hf.load(directory)
    segments = np.repeat([[0, 1]], [13, 27], axis=1)
    positions = np.concatenate([np.arange(13), np.arange(27)])[None]
    packed = apply(model, params, tokens[:1], segments=segments, positions=positions)
    alone = golden.reference(reference, tokens[:1, 13:])
    golden.assert_close(packed[:, 13:], alone)
    with pytest.raises(ValueError, match="segments"):
        model.apply(
            {"params": params}, tokens, segments=segments, cache=model.cache(2, 64)
        )


def test_remat_changes_no_gradient(case):
    directory, _, tokens, _ = case("qwen3")
    model, params = hf.load(directory)

    def slope(remat):
        config = dataclasses.replace(model.config, remat=remat)
        own = llama.Model(config)
        loss = lambda p: jnp.mean(own.apply({"params": p}, tokens[:, :8]) ** 2)
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))

    kept = slope("none")
    for again in (slope("full"), slope("dots")):
        for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again)):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * np.abs(a).max())


def test_longrope_turns_by_the_length_of_the_sequence_or_of_the_cache(case):
    directory, reference, tokens, _ = case("phi3")
    model, params = hf.load(directory)
    short = tokens[:, :24]
    expected = golden.reference(reference, short)
    golden.assert_close(apply(model, params, short), expected)
    few, many = (
        apply(model, params, short, cache=model.cache(2, slots))[0]
        for slots in (24, 25)
    )
    golden.assert_close(few, expected)
    golden.assert_apart(many, expected)


@pytest.mark.once
@pytest.mark.parametrize("name", ["phi3", "smollm3", "olmo2", "ministral"])
def test_what_is_saved_is_what_transformers_reads(case, name, tmp_path):
    directory, _, tokens, expected = case(name)
    model, params = hf.load(directory)
    hf.save(tmp_path, model.config, params)
    written = json.loads((tmp_path / "config.json").read_text())
    # their default, 32000 for Phi-3, is outside this vocabulary
    (tmp_path / "config.json").write_text(json.dumps(written | {"pad_token_id": 0}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == model.config.to_hf()["architectures"][0]
    golden.assert_close(golden.reference(theirs.eval(), tokens), expected)


@pytest.mark.parametrize(
    "name, leaves",
    [("phi3", 4), pytest.param("olmo2", 7, marks=pytest.mark.slow)],
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
    base = transformers.AutoModelForCausalLM.from_pretrained(directory)
    adapted = theirs.PeftModel.from_pretrained(base, tmp_path / "own").eval()
    expected = golden.reference(adapted, tokens)
    golden.assert_close(found, expected)
    golden.assert_apart(plain, expected)
    adapted.save_pretrained(tmp_path / "theirs")
    again = peft.load(tmp_path / "theirs", model.config, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, made)


LONG_TABLE = {"short_factor": SHORT, "long_factor": LONG, "type": "longrope"}


def told(kind, **fields):
    return {**SIZES, "model_type": kind, **fields}


@pytest.mark.parametrize(
    "config, message",
    [
        (told("phi3", attention_bias=True), "phi3 has no biases"),
        (told("phi3", rope_scaling=LONG_TABLE), "short_factor has 3 entries.* 4 pairs"),
        (told("phi3", partial_rotary_factor=0.9), "partial_rotary_factor=0.9 of head_"),
        (
            told(
                "phi3",
                rope_parameters={"partial_rotary_factor": 0.5},
                partial_rotary_factor=0.75,
            ),
            "partial_rotary_factor is 0.75, but 0.5",
        ),
        (
            told("phi3", rope_scaling={**LONG_TABLE, "long_factor": None}),
            "'longrope' lacks long_factor",
        ),
        (told("llama", rope_parameters=PARTIAL), "unknown fields.*partial_rotary"),
        (told("smollm3", no_rope_layers=[1, 0]), "no_rope_layers has 2 entries for"),
        (told("smollm3", no_rope_layers=[1, 0, 2]), "no_rope_layers.*<= 1"),
        (told("ministral", attention_bias=True), "ministral has no biases"),
    ],
)
def test_what_is_not_implemented_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        llama.Config.from_hf(config)


def test_a_layer_without_a_turn_of_its_own_is_refused():
    with pytest.raises(ValueError, match="turned has 1 entries for 32 layers"):
        llama.Config(turned=(True,))


def test_configs_of_the_hub():
    """As transformers 4 wrote them: Phi-3-mini-128k's keys, and SmolLM3's interval."""
    table = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3, "type": "su"}
    found = llama.Config.from_hf(
        told(
            "phi3",
            rope_scaling=table,
            rope_theta=10_000.0,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=16,
            resid_pdrop=0.0,
            sliding_window=262_144,
        )
    )
    assert found.rope == Rope(
        1e4, "longrope", 4.0, 16, part=0.75, short=(1.0,) * 3, long=(2.0,) * 3
    )
    assert found.rope.gain == pytest.approx((1 + np.log(4) / np.log(16)) ** 0.5)
    assert found.eps == 1e-5 and found.windows == (262_144,) * 3 and found.fused
    plain = told("phi3", original_max_position_embeddings=64, rope_scaling=None)
    assert llama.Config.from_hf(plain).rope == Rope()
    smol = told("smollm3", num_hidden_layers=8, no_rope_layer_interval=4)
    found = llama.Config.from_hf(smol)
    assert found.turned == (True, True, True, False) * 2
    assert found.tied and found.rope.base == 2e6 and found.windows == ()
