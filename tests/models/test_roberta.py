"""RoBERTa and BERT against `transformers`, and what their configs refuse."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import tree
from lorax.models import FAMILIES, context, roberta, table
from tests.models import encoders_golden as tools

MODULES = {name: FAMILIES[name] for name in ("roberta", "bert")}
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "type_vocab_size": 3,
    "layer_norm_eps": 0.05,
    "num_labels": 5,
}
TASKS = {"classification": "SequenceClassification", "mlm": "MaskedLM"}
CASES = [(family, head) for family in MODULES for head in TASKS]


def batch(family):
    """Tokens, their types, and which are real: padded right, left, or not at all."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 50, (3, 14))
    real = np.ones(tokens.shape, bool)
    real[0, 9:] = False
    real[1, :6] = False
    types = rng.integers(0, 3, tokens.shape)
    return np.where(real, tokens, 1 if family == "roberta" else 0), types, real


@functools.cache
def golden(family, head, activation="gelu"):
    """Config, variables, our arguments, and the logits of `transformers`."""
    torch = pytest.importorskip("torch", reason="needs the golden extra: transformers")
    hf = pytest.importorskip("transformers", reason="needs the golden extra")
    name = {"roberta": "Roberta", "bert": "Bert"}[family]
    build = getattr(hf, f"{name}Config")
    model = getattr(hf, f"{name}For{TASKS[head]}")(build(**TINY, hidden_act=activation))
    # around -2.7 the exact gelu and its approximation differ by several per cent
    gains = {"intermediate.dense.weight": 0.3, r"\d.output.dense.weight": 30.0}
    gains |= {r"classifier(.out_proj)?.weight": 3.0}
    tools.redraw(model, gains, {"intermediate.dense.bias": -2.7})
    tokens, types, real = batch(family)
    with torch.no_grad():
        want = model(
            torch.from_numpy(tokens),
            token_type_ids=torch.from_numpy(types),
            attention_mask=torch.from_numpy(real).long(),
        ).logits.numpy()
    config = roberta.Config.from_hf(model.config.to_dict(), head=head)
    variables = tools.load(model.state_dict(), MODULES[family], config, tokens)
    # transformers takes the first token even if it is padding; we the first real one
    where = real if head == "mlm" else np.array([True, False, True])
    return config, variables, (tokens, types, real), want, where


def logits(config, variables, arguments):
    tokens, types, real = map(jnp.asarray, arguments)
    return tools.run(roberta, config, variables, tokens, types=types, real=real)


@pytest.mark.parametrize("family, head", CASES)
def test_logits_are_those_of_transformers(family, head):
    config, variables, arguments, want, where = golden(family, head)
    got = logits(config, variables, arguments)
    assert got.dtype == jnp.float32
    assert tools.error(got, want, where) <= tools.TOLERANCE


def test_the_head_of_roberta_has_an_activation_of_its_own():
    config, variables, arguments, want, where = golden("roberta", "mlm", "relu")
    got = logits(config, variables, arguments)
    assert tools.error(got, want, where) <= tools.TOLERANCE


def fewer_heads(variables):
    """The same matrices, split into two heads."""
    wide = {(3, 32, 4, 8): (3, 32, 2, 16), (3, 4, 8, 32): (3, 2, 16, 32)}
    wide[3, 4, 8] = 3, 2, 16
    return jax.tree.map(lambda x: x.reshape(wide.get(x.shape, x.shape)), variables)


MUTATIONS = {
    "activation": {"activation": "relu"},
    "exact gelu": {"activation": "gelu_new"},
    "eps": {"eps": 1e-12},
    "offset": {"offset": 1},
    "heads": {"heads": 2},
    "positions of real tokens": {},
    "types": {},
    "real": {},
}
SWITCHES = [("roberta", switch) for switch in MUTATIONS]
# the families share their code: BERT's own switches, and its head's activation
SWITCHES += [("bert", name) for name in ("exact gelu", "positions of real tokens")]


@pytest.mark.parametrize("family, switch", SWITCHES)
def test_every_switch_moves_the_logits(family, switch):
    config, variables, arguments, want, where = golden(family, "mlm")
    tokens, types, real = map(jnp.asarray, arguments)
    options = {"types": types, "real": real}
    if switch == "heads":
        variables = fewer_heads(variables)
    elif switch == "positions of real tokens":  # as in the other family
        counted = real if family == "bert" else None
        options["positions"] = context.positions_of(tokens, counted, None)
    elif switch == "types":
        options["types"] = jnp.zeros_like(types)
    elif switch == "real":  # RoBERTa's positions are unchanged
        counted = real if family == "roberta" else None
        options["positions"] = context.positions_of(tokens, counted, None)
        options["real"] = jnp.ones_like(real)
    other = dataclasses.replace(config, **MUTATIONS[switch])
    got = tools.run(roberta, other, variables, tokens, **options)
    assert tools.error(got, want, where) >= tools.MUTATION


SMALL = roberta.Config(
    vocabulary=30, positions=16, width=16, layers=2, heads=2, hidden=24, labels=3
)
SMALLS = {
    "roberta": SMALL,
    "bert": dataclasses.replace(SMALL, family="bert", offset=0),
}


@pytest.mark.parametrize("family, head", CASES)
def test_the_table_names_every_parameter(family, head):
    config = dataclasses.replace(SMALLS[family], head=head)
    assert roberta.Config.from_hf(config.to_hf()) == config
    for scan in (True, False):
        config = dataclasses.replace(config, scan=scan)
        tokens = jnp.ones((1, 4), jnp.int32)
        init = functools.partial(roberta.Model(config).init, jax.random.key(0))
        leaves = tree.flatten(jax.eval_shape(init, tokens))
        axes = table.logical_axes(roberta.entries(config), config.stacks, scan)
        assert {path: leaf.ndim for path, leaf in leaves.items()} == {
            path: len(names) for path, names in axes.items()
        }


def test_scan_and_remat_change_nothing_and_bfloat16_little():
    config = dataclasses.replace(SMALL, head="mlm")
    tokens = jnp.arange(10).reshape(2, 5)
    variables = tools.drawn(roberta, config, tokens)
    want = tools.run(roberta, config, variables, tokens)
    apart, split = tools.unscanned(config, variables)
    for other, values in ((apart, split), (remat(config), variables)):
        got = tools.run(roberta, other, values, tokens)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    half = dataclasses.replace(config, dtype=jnp.bfloat16)
    got = tools.run(roberta, half, variables, tokens)
    assert got.dtype == jnp.float32
    assert 0 < jnp.max(jnp.abs(got - want)) < 0.2 * jnp.std(want)


def remat(config):
    return dataclasses.replace(config, remat="full")


def test_padding_on_the_left_is_padding_on_the_right():
    right = jnp.array([[5, 6, 7, 1, 1], [8, 9, 4, 3, 2]])
    left = jnp.array([[1, 1, 5, 6, 7], [8, 9, 4, 3, 2]])
    variables = tools.drawn(roberta, SMALL, right)
    rows = [
        tools.run(roberta, SMALL, variables, tokens, real=tokens != 1)
        for tokens in (right, left)
    ]
    np.testing.assert_allclose(*rows, rtol=1e-5, atol=1e-5)
    assert jnp.std(rows[0]) > 0.1


def test_positions_and_dropout():
    tokens = jnp.ones((1, 3), jnp.int32)
    variables = tools.drawn(roberta, SMALL, tokens)
    with pytest.raises(ValueError, match="15 tokens, but there are 14 positions"):
        roberta.Model(SMALL).apply(variables, jnp.ones((1, 15), jnp.int32))
    want = tools.run(roberta, SMALL, variables, tokens)
    config = dataclasses.replace(SMALL, dropout=0.5)
    positions = jnp.arange(3)[None]
    same = tools.run(roberta, config, variables, tokens, positions=positions)
    np.testing.assert_allclose(same, want, rtol=1e-5)
    train = functools.partial(roberta.Model(config).apply, deterministic=False)
    rngs = {"dropout": jax.random.key(1)}
    moved = tools.call(train, variables, tokens, rngs=rngs)
    assert jnp.max(jnp.abs(moved - want)) > 0.01


def test_fields_that_config_json_leaves_out():
    base = roberta.Config.from_hf({"model_type": "roberta", "type_vocab_size": 1})
    assert base == dataclasses.replace(roberta.Config(), positions=512, eps=1e-12)
    config = roberta.Config.from_hf({"model_type": "bert", "_num_labels": 4})
    assert (config.vocabulary, config.offset, config.types) == (30522, 0, 2)
    assert config.labels == 4 and config.head == "classification"
    named = {"model_type": "bert", "architectures": ["BertForPreTraining"]}
    assert roberta.Config.from_hf(named).head == "mlm"
    assert roberta.Config.from_hf(named, head="classification", scan=False) == (
        roberta.Config.from_hf({"model_type": "bert"}, scan=False)
    )


REFUSED = {
    "position_embedding_type='relative_key' is not": {
        "position_embedding_type": "relative_key"
    },
    "is_decoder=True is not implemented for bert": {"is_decoder": True},
    "add_cross_attention=True": {"add_cross_attention": True},
    "tie_word_embeddings=False": {"tie_word_embeddings": False},
    "pruned_heads": {"pruned_heads": {"0": [1]}},
    "hidden_act='mish' is not implemented; known are gelu": {"hidden_act": "mish"},
    "embedding_size=128": {"embedding_size": 128},
    "vocab_size=0; it must be an int >= 1": {"vocab_size": 0},
    "layer_norm_eps='1e-5'; it must be a number > 0": {"layer_norm_eps": "1e-5"},
    "num_attention_heads=5 does not divide hidden_size=768": {"num_attention_heads": 5},
    "tie_word_embeddings=1.5": {"tie_word_embeddings": 1.5},
    "pad_token_id=511; it must be an int >= 0 and <= 510": {"pad_token_id": 511},
    "id2label={}; it must be an object of 1 or more": {"id2label": {}},
    r"architectures=\[3\]; it must be a list": {"architectures": [3]},
    "hidden_act={}; it must be text": {"hidden_act": {}},
    "ForQuestionAnswering.*choose head=": {
        "architectures": ["BertForQuestionAnswering"]
    },
    "labels is given twice": {"num_labels": 3, "id2label": {"0": "no", "1": "yes"}},
    "model_type='electra'": {"model_type": "electra"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_implemented_is_refused(message):
    with pytest.raises(ValueError, match=message):
        roberta.Config.from_hf({"model_type": "bert"} | REFUSED[message])


def test_the_offset_is_the_family_s():
    with pytest.raises(ValueError, match="offset=2: BERT's first token is in row 0"):
        roberta.Config(family="bert")
    with pytest.raises(ValueError, match="offset=0: RoBERTa's first token is in row 1"):
        roberta.Config(offset=0)


@pytest.mark.parametrize("family", MODULES)
def test_adapters_train(family):
    config = SMALLS[family]
    tokens, labels = jnp.arange(10).reshape(2, 5), jnp.array([0, 2])
    real = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    model, params = roberta.Model(config), tools.drawn(roberta, config, tokens)

    def loss(params):
        logits = model.apply(params, tokens, real=real)
        xent = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(xent(logits, labels))

    targets = [
        lorax.Target("layers/[qv]/kernel", rank=2),
        lorax.Target("classifier_.*", adapter="full"),
    ]
    grads = tools.gradients(loss, params, targets)
    assert len(grads) == 6 and grads["layers/q/kernel"].b.shape == (2, 2, 2, 8)


@pytest.mark.parametrize("family, module", MODULES.items())
def test_older_names(family, module):
    keys = {entry.key for entry in module.entries(SMALLS[family])}
    for old in ("embeddings.LayerNorm.gamma", "embeddings.LayerNorm.beta"):
        for pattern, new in module.ALIASES:
            old = re.sub(f"^{pattern}", new, old)
        assert old in keys
