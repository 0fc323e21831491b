"""The decoder: causality, relative positions, scoring and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.generation import decoder
from experiments.generation.sample import sample_text
from experiments.trainer import metrics, objects


@pytest.fixture(scope="module")
def model_and_params():
    model = decoder.Decoder(vocabulary=256, layers=2, width=16, heads=2, hidden=32)
    tokens = jnp.zeros((1, 8), jnp.int32)
    return model, model.init(jax.random.key(0), tokens)["params"]


def test_layers_are_stacked_on_axis_0(model_and_params):
    _, params = model_and_params
    assert params["layers"]["attn"]["q"]["kernel"].shape == (2, 16, 16)
    assert params["layers"]["mlp"]["up"]["kernel"].shape == (2, 16, 32)


def test_a_byte_changes_only_what_follows(model_and_params):
    model, params = model_and_params
    tokens = jax.random.randint(jax.random.key(1), (1, 8), 0, 256)
    changed = tokens.at[0, 5].add(1)
    before, after = (model.apply({"params": params}, t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert jnp.abs(before[:, 5:] - after[:, 5:]).max() > 1e-4


def test_a_prefix_is_places_before_the_sequence(model_and_params):
    model, params = model_and_params
    first, tokens = jnp.array([65, 66, 67]), jnp.arange(10).reshape(2, 5)
    longer, own = decoder.with_prefix(model, params, first)
    given = longer.apply({"params": own}, tokens)
    assert given.shape == (2, 5, 256)
    # untrained, a prefix equals those bytes before the sequence
    joined = jnp.concatenate([jnp.broadcast_to(first, (2, 3)), tokens], axis=1)
    expected = model.apply({"params": params}, joined)[:, 3:]
    np.testing.assert_allclose(given, expected, atol=1e-5)
    made = longer.init(jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, own)
    moved = {**own, "prefix": own["prefix"] + 1}
    assert jnp.abs(longer.apply({"params": moved}, tokens) - given).max() > 1e-4


def test_rotation_depends_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 4))
    place = lambda x, at: decoder.rotate(jnp.zeros((1, 9, 1, 4)).at[0, at, 0].set(x))
    score = lambda i, j: jnp.vdot(place(q, i)[0, i, 0], place(k, j)[0, j, 0])
    np.testing.assert_allclose(score(5, 2), score(8, 5), rtol=1e-5)
    np.testing.assert_allclose(score(4, 4), jnp.vdot(q, k), rtol=1e-5)
    assert abs(score(5, 2) - score(5, 4)) > 1e-3


def test_bits_per_byte_of_uniform_guesses_is_eight(model_and_params):
    model, params = model_and_params
    flat = jax.tree.map(jnp.zeros_like, params)
    batch = {
        "inputs": np.zeros((2, 8), np.int32),
        "targets": np.ones((2, 8), np.int32),
        "weights": np.ones((2, 8), np.float32),
    }
    padding = dict(batch, weights=np.eye(2, 8, dtype=np.float32))
    evaluate = metrics.make_bits_per_byte(objects.make_loss(model))
    np.testing.assert_allclose(evaluate(flat, [batch, padding]), 8.0, rtol=1e-6)


def test_recovered_share_of_the_gain():
    assert metrics.recovered(base=3.0, adapted=2.2, full=2.0) == pytest.approx(0.8)
    assert np.isnan(metrics.recovered(base=2.0, adapted=1.9, full=2.1))


def test_greedy_sampling_is_the_argmax_of_the_model(model_and_params):
    model, params = model_and_params
    # An ASCII-only head, so that bytes and characters correspond one to one.
    kernel = params["head"]["kernel"].at[:, 128:].set(0.0) * 100
    params = params | {"head": {"kernel": kernel}}
    context, prompt = 6, b"abcd"
    text = sample_text(
        jax.random.key(0), model, params, prompt,
        length=6, context=context, temperature=0.0,
    )  # fmt: skip
    expected = list(prompt)
    for _ in range(6):
        seen = jnp.array([expected[-context:]])
        expected.append(int(model.apply({"params": params}, seen)[0, -1].argmax()))
    assert text == bytes(expected).decode("utf-8", "replace")


def test_an_empty_prompt_is_refused(model_and_params):
    with pytest.raises(ValueError, match="eval.prompt is empty"):
        sample_text(
            jax.random.key(0), *model_and_params, b"",
            length=1, context=4, temperature=1.0,
        )  # fmt: skip
