"""Gemma 1 to 3 against transformers: every switch, cache, padding, packing, heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import losses
from lorax.interop import hf, peft
from lorax.models import gemma
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
    "head_dim": 16,
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 9,
    "sliding_window": 6,
    "rms_norm_eps": 1e-2,
    "pad_token_id": 0,
    "attn_implementation": "eager",  # their only one with soft caps
}
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
LACKS = {"query_pre_attn_scalar": None, "sliding_window": None}
FIRST = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, **LACKS}
CASES = {
    "gemma": ("Gemma", FIRST),
    "gemma-gelu": ("Gemma", {"hidden_act": "gelu", "attention_bias": True, **LACKS}),
    "gemma2": ("Gemma2", CAPS),
    "gemma2-biases": ("Gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma3": (
        "Gemma3Text",
        {
            "rope_parameters": ROPES,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Makes each case's model once: directory, model, tokens and reference logits."""
    made = {}

    def make(name):
        if name not in made:
            kind, fields = CASES[name]
            config = getattr(transformers, f"{kind}Config")(**{**SIZES, **fields})
            model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")
            model = model(config)
            golden.redraw(model, size=2.0)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            tokens = golden.tokens_of(61, time=40)  # beyond the windows
            made[name] = directory, model, tokens, golden.reference(model, tokens)
        return made[name]

    return make


def apply(model, params, tokens, **kwargs):
    return jax.jit(lambda p: model.apply({"params": p}, tokens, **kwargs))(params)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(case, name, tmp_path):
    directory, _, tokens, expected = case(name)
    model, params = hf.load(directory)
    golden.assert_close(apply(model, params, tokens), expected)
    assert gemma.Config.from_hf(model.config.to_hf()) == model.config
    hf.save(tmp_path / "again", model.config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager", dtype=torch.float64
    )
    golden.assert_close(golden.reference(theirs.eval(), tokens), expected)


ROPE = gemma.rope.Rope(base=77.0)
MUTATIONS = {
    "post_norms": ("gemma2", {"post_norms": False}),
    "gemma's scale": ("gemma", {"query_scale": 256}),
    "gemma's rope": ("gemma", {"rope": ROPE}),
    "gemma's activation": ("gemma", {"activation": "silu"}),
    "eps": ("gemma2", {"eps": 1e-6}),
    "rope": ("gemma2", {"rope": ROPE}),
    "local rope": ("gemma2", {"local_rope": ROPE}),
    "activation": ("gemma2", {"activation": "silu"}),
    "query_scale": ("gemma2", {"query_scale": 16}),
    "soft_cap": ("gemma2", {"soft_cap": None}),
    "logit_cap": ("gemma2", {"logit_cap": None}),
    "windows": ("gemma2", {"windows": (6, 6, 6)}),
    "window + 1": ("gemma2", {"windows": (7, 0, 7)}),
    "qkv_bias": ("gemma2-biases", {"qkv_bias": False}),
    "stretched rope": ("gemma3", {"rope": gemma.rope.Rope(base=500.0)}),
    "gemma3's local rope": ("gemma3", {"local_rope": ROPE}),
    "qk_norm": ("gemma3", {"qk_norm": False}),
}


@pytest.mark.once
@pytest.mark.parametrize("name", MUTATIONS)
def test_every_switch_matters(case, name):
    base, changed = MUTATIONS[name]
    directory, _, tokens, expected = case(base)
    model, params = hf.load(directory, scan=False)
    assert all(getattr(model.config, k) != v for k, v in changed.items())
    mutant = gemma.Model(dataclasses.replace(model.config, **changed))
    found = mutant.apply({"params": params}, tokens[:1])
    golden.assert_apart(found, expected[:1])


@pytest.mark.parametrize(
    "name, scan", [("gemma2", True), ("gemma3", False), ("gemma", True)]
)
def test_left_padding_and_cache(case, name, scan):
    directory, reference, tokens, _ = case(name)
    real = golden.left_padded([40, 23], 40)
    expected = np.zeros((2, 40, 61))
    for row, length in enumerate([40, 23]):  # alone: theirs are NaN where all is masked
        own = tokens[row : row + 1, 40 - length :]
        expected[row, 40 - length :] = golden.reference(reference, own)[0]
    model, params = hf.load(directory, scan=scan)
    golden.assert_close(apply(model, params, tokens, real=real), expected, real)
    golden.assert_close(golden.cached(model, params, tokens, real), expected, real)


def test_packed_documents_and_attention_in_chunks(case):
    directory, reference, tokens, _ = case("gemma2")
    model, params = hf.load(directory, attention="lean")
    segments = np.repeat([[0, 1]], [13, 27], axis=1)
    positions = np.concatenate([np.arange(13), np.arange(27)])[None]
    packed = apply(model, params, tokens[:1], segments=segments, positions=positions)
    alone = golden.reference(reference, tokens[:1, 13:])
    golden.assert_close(packed[:, 13:], alone)


def test_the_loss_from_hidden_states_has_the_cap(case):
    directory, _, tokens, expected = case("gemma2")
    model, params = hf.load(directory)
    hidden = apply(model, params, tokens[:, :-1], hidden=True)
    found = losses.chunked_cross_entropy(
        hidden, model.head_of(params), jnp.asarray(tokens[:, 1:]), chunk=16
    )
    wide = expected[:, :-1]
    nll = np.log(np.exp(wide).sum(-1))
    nll -= np.take_along_axis(wide, tokens[:, 1:, None], -1)[..., 0]
    assert float(found.mean) == pytest.approx(nll.mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_adapters_are_those_of_peft(case, name, tmp_path):
    theirs = pytest.importorskip("peft", reason="needs the golden extra")
    directory, _, tokens, plain = case(name)
    model, params = hf.load(directory)

    def call(params):
        return model.apply({"params": params}, tokens)

    target = lorax.Target("all-linear", rank=3, alpha=6.0)
    made, _ = lorax.init(
        jax.random.key(0), params, target, lorax.discover(call, params)
    )
    assert len(made) == 7
    draw = np.random.default_rng(0)
    moved = lambda x: x + 0.1 * draw.standard_normal(x.shape, np.float32)
    made = jax.tree.map(moved, made)
    found = jax.jit(lorax.adapt(call, on_merge="error"))(made, params)
    peft.save(tmp_path / "own", made, model.config)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager"
    )
    adapted = theirs.PeftModel.from_pretrained(base, tmp_path / "own").eval()
    expected = golden.reference(adapted, tokens)
    # a few logits of Gemma 2 are 2e-5 away, as torch's own float32 is
    golden.assert_same(found, expected, each=name == "gemma3")
    golden.assert_apart(plain, expected)
    adapted.save_pretrained(tmp_path / "theirs")
    again = peft.load(tmp_path / "theirs", model.config, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, made)


ACTS = {"hidden_act": "relu", "hidden_activation": "silu"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "gemma4"}, "'gemma4' is not one of gemma, gemma2, gemma3_text"),
        (
            {"model_type": "gemma", **LACKS, **ACTS},
            "hidden_act='relu' and hidden_activation",
        ),
        ({"head_dim": 15}, "head_dim=15; rotary positions need an even size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"layer_types": ["sliding_attention"]}, "1 entries for num_hidden_layers=3"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"attn_logit_softcapping": 50.0}, "transformers has it only for gemma2"),
        ({"rope_parameters": {"rope_type": "linear"}}, "one table for each of full"),
        ({"altup": True}, "unknown fields.*altup"),
    ],
)
def test_what_is_not_implemented_is_refused(fields, message):
    sizes = {k: v for k, v in SIZES.items() if k != "attn_implementation"}
    with pytest.raises(ValueError, match=message):
        gemma.Config.from_hf({**sizes, "model_type": "gemma3_text", **fields})


def test_a_config_of_transformers_4():
    """As in Gemma 3's files on the hub: by pattern, with two bases."""
    sizes = {k: v for k, v in SIZES.items() if k != "attn_implementation"}
    fields = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000,
        "rope_local_base_freq": 10_000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "cache_implementation": "hybrid",
    }
    config = gemma.Config.from_hf({**sizes, **fields})
    assert config.windows == (6, 6, 6, 6, 6, 0, 6)
    assert config.rope == gemma.rope.Rope(base=1e6, kind="linear", factor=8.0)
    assert config.local_rope == gemma.rope.Rope(base=1e4)
    assert config.soft_cap is None and config.logit_cap is None and config.qk_norm
