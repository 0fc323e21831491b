"""DeBERTa against `transformers`, and what its config refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import tree
from lorax.interop import hf
from lorax.models import deberta, table
from tests.models import encoders_golden as tools

TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "layer_norm_eps": 0.05,
    "num_labels": 5,
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}
KINDS = {
    "v3": {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "v2": {
        "position_buckets": 8,
        "max_relative_positions": 20,
        "max_position_embeddings": 48,
        "position_biased_input": True,
        "type_vocab_size": 3,
        "pooler_hidden_act": "relu",
    },
    "no buckets": {"max_relative_positions": 6, "pos_att_type": ["p2c"]},
    "no distances": {"relative_attention": False, "pos_att_type": None},
}
TIME = 40  # beyond every bucket


def batch():
    """Tokens, their types, and which are real: padded right, left, or not at all."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 50, (3, TIME))
    real = np.ones(tokens.shape, bool)
    real[0, 34:] = False
    real[1, :6] = False
    return np.where(real, tokens, 0), rng.integers(0, 3, tokens.shape), real


@functools.cache
def golden(kind, head="classification"):
    """Config, variables, our arguments, their outputs, and where to compare."""
    torch = pytest.importorskip("torch", reason="needs the golden extra: transformers")
    theirs = pytest.importorskip("transformers", reason="needs the golden extra")
    names = {"classification": "ForSequenceClassification", "none": "Model"}
    build = getattr(theirs, f"DebertaV2{names[head]}")
    model = build(theirs.DebertaV2Config(**TINY | KINDS[kind]))
    gains = {"classifier.weight": 3.0, "(query|key)_proj.weight": 0.5}
    tools.redraw(model, gains)
    tokens, types, real = batch()
    with torch.no_grad():
        found = model(
            torch.from_numpy(tokens),
            token_type_ids=torch.from_numpy(types),
            attention_mask=torch.from_numpy(real).long(),
        )
    want = found.logits if head == "classification" else found.last_hidden_state
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config = deberta.Config.from_hf(raw)
    tensors = model.state_dict()
    if head != "none":  # a bare model's names are its modules'
        tensors = {hf.renamed(deberta, k): t for k, t in tensors.items()}
    variables = tools.load(tensors, deberta, config, tokens)
    # transformers takes the first token even if it is padding; we the first real one
    where = np.array([True, False, True]) if head == "classification" else real
    options = {"types": types if config.types else None, "real": real}
    return config, variables, (tokens, options), want.numpy(), where


def run(config, variables, arguments):
    tokens, options = arguments
    return tools.run(deberta, config, variables, tokens, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind):
    config, variables, arguments, want, where = golden(kind)
    got = run(config, variables, arguments)
    assert got.dtype == jnp.float32
    assert tools.error(got, want, where) <= tools.TOLERANCE


def test_the_bare_encoder_returns_what_transformers_does():
    config, variables, arguments, want, where = golden("v3", "none")
    assert config.head == "none"
    got = run(config, variables, arguments)
    assert tools.error(got, want, where) <= tools.TOLERANCE


def test_rows_are_those_of_transformers():
    theirs = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    torch = pytest.importorskip("torch")
    away = torch.arange(1200)[:, None] - torch.arange(1200)[None]
    for config in (deberta.Config(), deberta.Config(buckets=8, max_distance=20)):
        span = config.buckets
        want = theirs.make_log_bucket_position(away, span, config.max_distance)
        want = torch.clamp(want + span, 0, 2 * span - 1).long().numpy()
        np.testing.assert_array_equal(deberta.rows_of(1200, config), want)


MUTATIONS = {
    ("v3", "activation"): {"activation": "relu"},
    ("v3", "eps"): {"eps": 1e-7},
    ("v3", "c2p"): {"terms": ("p2c",)},
    ("v3", "p2c"): {"terms": ("c2p",)},
    ("v3", "log buckets"): {"buckets": 0, "max_distance": 8},
    ("v3", "largest distance"): {"max_distance": 60},
    ("v3", "norm of distances"): {"norm_distances": False},
    ("v3", "activation of the classifier"): {"pooled": "relu"},
    ("v3", "real"): {},
    ("v2", "shared projections"): {"shared": True},
    ("v2", "positions"): {"absolute": False},
    ("v2", "types"): {},
}


@pytest.mark.parametrize("kind, switch", MUTATIONS)
def test_every_switch_moves_the_logits(kind, switch):
    config, variables, (tokens, options), want, where = golden(kind)
    options = dict(options)
    if switch in ("types", "real"):
        options[switch] = None
    other = dataclasses.replace(config, **MUTATIONS[kind, switch])
    got = run(other, variables, (tokens, options))
    assert tools.error(got, want, where) >= tools.MUTATION


SMALL = deberta.Config(
    30, width=16, layers=2, heads=2, hidden=24, labels=3, buckets=4, max_distance=6
)
OTHER = dataclasses.replace(
    SMALL, types=2, absolute=True, shared=False, norm_distances=False, head="none"
)


@pytest.mark.parametrize("config", [SMALL, OTHER])
def test_the_table_names_every_parameter(config):
    assert deberta.Config.from_hf(config.to_hf()) == config
    for scan in (True, False):
        config = dataclasses.replace(config, scan=scan)
        tokens = jnp.ones((1, 4), jnp.int32)
        init = functools.partial(deberta.Model(config).init, jax.random.key(0))
        leaves = tree.flatten(jax.eval_shape(init, tokens))
        axes = table.logical_axes(deberta.entries(config), config.stacks, scan)
        assert {path: leaf.ndim for path, leaf in leaves.items()} == {
            path: len(names) for path, names in axes.items()
        }


def test_scan_and_remat_change_nothing_and_bfloat16_little():
    tokens = jnp.arange(10).reshape(2, 5)
    variables = tools.drawn(deberta, SMALL, tokens)
    want = tools.run(deberta, SMALL, variables, tokens)
    apart, split = tools.unscanned(SMALL, variables)
    rematerialised = dataclasses.replace(SMALL, remat="full")
    for other, values in ((apart, split), (rematerialised, variables)):
        got = tools.run(deberta, other, values, tokens)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    half = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    got = tools.run(deberta, half, variables, tokens)
    assert got.dtype == jnp.float32
    assert 0 < jnp.max(jnp.abs(got - want)) < 0.2 * jnp.std(want)


def test_dropout_and_what_the_call_refuses():
    tokens = jnp.ones((1, 3), jnp.int32)
    variables = tools.drawn(deberta, SMALL, tokens)
    want = tools.run(deberta, SMALL, variables, tokens)
    config = dataclasses.replace(SMALL, dropout=0.5)
    train = functools.partial(deberta.Model(config).apply, deterministic=False)
    moved = tools.call(train, variables, tokens, rngs={"dropout": jax.random.key(1)})
    assert jnp.max(jnp.abs(moved - want)) > 0.01
    with pytest.raises(ValueError, match="no embedding of types; leave types out"):
        deberta.Model(SMALL).apply(variables, tokens, types=tokens)
    short = dataclasses.replace(SMALL, absolute=True, positions=2)
    with pytest.raises(ValueError, match="3 tokens, but there are 2 positions"):
        deberta.Model(short).init(jax.random.key(0), tokens)
    with pytest.raises(ValueError, match="give some of .*, in this order"):
        deberta.Config(terms=("p2c", "c2p"))


REFUSED = {
    "conv_kernel_size=3: the convolution": {"conv_kernel_size": 3},
    "embedding_size=128 is not implemented": {"embedding_size": 128},
    "pos_att_type has .'p2p'.*known are c2p, p2c": {"pos_att_type": "p2c|p2p"},
    "relative_attention=False and pos_att_type=.'c2p'": {"pos_att_type": ["c2p"]},
    "relative_attention=True and pos_att_type=..:": {"relative_attention": True},
    "hidden_act='mish' is not implemented": {"hidden_act": "mish"},
    "num_attention_heads=5 does not divide": {"num_attention_heads": 5},
    "z_steps=2": {"z_steps": 2},
    "MaskedLM.*choose head='classification' or 'none'": {
        "architectures": ["DebertaV2ForMaskedLM"]
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_implemented_is_refused(message):
    with pytest.raises(ValueError, match=message):
        deberta.Config.from_hf({"model_type": "deberta-v2"} | REFUSED[message])


@pytest.mark.parametrize("config", [SMALL, OTHER])
def test_adapters_train(config):
    """The projections are used twice: for content and for distances."""
    tokens, labels = jnp.arange(10).reshape(2, 5), jnp.array([0, 2])
    real = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    model, params = deberta.Model(config), tools.drawn(deberta, config, tokens)

    def loss(params):
        logits = model.apply(params, tokens, real=real)
        if config.head == "none":
            return jnp.mean(jnp.square(logits))
        xent = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(xent(logits, labels))

    assert not set(lorax.discover(loss, params)) - set(tree.flatten(params))
    targets = [lorax.Target("layers/(pos_)?[qkv]/kernel", rank=2)]
    if config.head == "classification":
        targets += [lorax.Target("classifier_.*", adapter="full")]
    grads = tools.gradients(loss, params, targets)
    assert grads["layers/q/kernel"].b.shape == (2, 2, 2, 8)
