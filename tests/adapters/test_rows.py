"""Training only some rows of an embedding: by hand, tied and untied; refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import checkpoint, compose, losses, sharding
from lorax.adapters import Rows
from lorax.losses import Head
from tests import programs

WORDS, WIDTH, CHOSEN = 11, 6, (2, 9, 10)
IDS = np.array([[0, 2, 9, 2], [10, 3, 9, 1]])
TARGETS = np.array([[2, 9, 5, 1], [3, 9, 10, 0]])
ROWS = functools.partial(lorax.Target, adapter="rows", rows=CHOSEN)


def tied(params, ids):
    hidden = jnp.tanh(params["embedding"][ids] @ params["w"])
    head = Head(params["embedding"], tied=True)
    weights = jnp.ones(ids.shape)
    return losses.chunked_cross_entropy(hidden, head, TARGETS, weights, chunk=3).mean


def untied(params, ids):
    hidden = jnp.tanh(params["embedding"][ids] @ params["w"])
    weights = jnp.ones(ids.shape)
    return losses.chunked_cross_entropy(
        hidden, params["head"], TARGETS, weights, chunk=3
    ).mean


def model(loss):
    """Parameters, and the kernels of a loss."""
    params = {
        "embedding": programs.normal(0, WORDS, WIDTH),
        "w": programs.normal(1, WIDTH, WIDTH),
    }
    if loss is untied:
        params["head"] = programs.normal(2, WIDTH, WORDS)
    return params, lorax.discover(loss, params, IDS)


def adapted(loss):
    params, kernels = model(loss)
    targets = [ROWS("embedding|head"), lorax.Target("w", rank=2)]
    made, params = lorax.init(jax.random.key(0), params, targets, kernels)
    return programs.perturbed(made), params


def test_merging_changes_the_rows_alone():
    params = {"e": jnp.zeros((4, 2)), "h": jnp.ones((2, 3))}
    values = jnp.array([[1.0, 2], [3, 4]])
    adapters = {
        "e": Rows(lorax.Axes((0,), (1,)), (1, 3), 4, embedding=values),
        "h": Rows(lorax.Axes((0,), (1,)), (0, 2), 3, head=values, scale=10.0),
    }
    merged = lorax.merge(adapters, params)
    np.testing.assert_array_equal(merged["e"], [[0, 0], [1, 2], [0, 0], [3, 4]])
    np.testing.assert_array_equal(merged["h"], [[11, 1, 21], [31, 1, 41]])


@pytest.mark.parametrize("loss", [tied, untied])
def test_the_gradient_is_that_of_the_rows(loss):
    """Compared with plain arrays and the rows written by numpy; nothing is merged."""
    adapters, params = adapted(loss)
    run = lorax.adapt(loss, on_merge="error")
    value, grads = jax.jit(jax.value_and_grad(run))(adapters, params, IDS)
    merged = {path: np.array(leaf) for path, leaf in params.items()}
    merged["embedding"][list(CHOSEN)] += adapters["embedding"].embedding
    merged["w"] += 8 * np.asarray(adapters["w"].a) @ np.asarray(adapters["w"].b)
    if loss is untied:
        merged["head"][:, list(CHOSEN)] += adapters["head"].head
    want, dense = jax.jit(jax.value_and_grad(loss))(merged, IDS)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for path, adapter in adapters.items():
        if not isinstance(adapter, Rows):
            continue
        theirs = np.asarray(dense[path])
        if path == "embedding":
            ours, theirs = grads[path].embedding, theirs[list(CHOSEN)]
        else:
            ours, theirs = grads[path].head, theirs[:, list(CHOSEN)]
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * largest)


def test_a_start_of_zeros_decays_to_the_base():
    params, kernels = model(tied)
    adapters, _ = lorax.init(jax.random.key(0), params, ROWS("embedding"), kernels)
    (own,) = adapters.values()
    assert own.embedding.shape == (3, WIDTH) and not own.embedding.any()
    assert own.rows == CHOSEN and own.size == WORDS and own.head is None
    assert lorax.optim.decay_mask(adapters)["embedding"].embedding is True
    (told,) = lorax.describe(params, ROWS("embedding"), kernels).adapted
    assert (told.adapter, told.parameters) == ("Rows", 3 * WIDTH)


def test_a_quantised_head_takes_them():
    params, kernels = model(untied)
    packed = lorax.quantize(params, [("head", "int8")], kernels)
    adapters, _ = adapted(untied)
    got = jax.jit(lorax.adapt(untied, on_merge="error"))(adapters, packed, IDS)
    want = jax.jit(untied)(lorax.merge(adapters, packed), IDS)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_checkpoint_gives_them_back(tmp_path):
    adapters, params = adapted(untied)
    checkpoint.save_adapters(tmp_path / "a", adapters, params)
    found = checkpoint.load_adapters(tmp_path / "a", params=params)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)


def test_sums_and_plain_lora_are_the_same_update():
    adapters, params = adapted(untied)
    rows = {path: a for path, a in adapters.items() if path != "w"}
    both, error = compose.combine([rows, compose.scale(rows, 2.0)], [1.0, 0.5])
    for path, leaf in lorax.merge(both, params).items():
        change = lorax.merge(rows, params)[path] - params[path]
        np.testing.assert_allclose(leaf, params[path] + 2 * change, atol=1e-6)
    assert not any(error.values())


def test_they_lie_as_their_embedding_does():
    adapters, params = adapted(untied)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    axes = {
        "embedding": ("vocab", "embed"),
        "head": ("embed", "vocab"),
        "w": (None,) * 2,
    }
    placed = sharding.place(params, mesh, axes)
    specs = sharding.adapter_specs(adapters, placed.specs)
    assert tuple(specs["embedding"].embedding) == (None, "fsdp")
    assert tuple(specs["head"].head) == ("fsdp", None)


@pytest.mark.parametrize(
    "target, message",
    [
        ({"rows": (3, 3)}, r"rows=\(3, 3\); give increasing numbers from 0"),
        ({"rows": (4, 3)}, "give increasing numbers"),
        ({"rows": (-1, 3)}, "give increasing numbers"),
        ({"rows": ()}, "give increasing numbers"),
        ({"rows": (1.5,)}, "give increasing numbers"),
        ({"adapter": "rows", "rows": None}, "and their numbers"),
        ({"adapter": "lora"}, "give both adapter='rows'"),
        ({"dropout": 0.1}, "no branch to apply it to"),
        ({"init": "pissa"}, "init='pissa' has no meaning for adapter='rows'"),
        ({"pattern": "w"}, r"rows=\(2, 9, 10\) .* is used by 'dot'"),
        (
            {"rows": range(9, 12)},
            r"the vocabulary has 11, 0 to 10; .*resize_embeddings",
        ),
    ],
)
def test_what_is_refused(target, message):
    params, kernels = model(tied)
    with pytest.raises(ValueError, match=message):
        given = ROWS(**{"pattern": "embedding", **target})
        lorax.init(jax.random.key(0), params, given, kernels)


def test_without_kernels_nobody_knows_what_is_an_embedding():
    params, _ = model(tied)
    with pytest.raises(
        ValueError, match="in an unknown way; .*pass kernels=lorax.discover"
    ):
        lorax.init(jax.random.key(0), params, ROWS("embedding"))


def test_another_vocabulary_is_told():
    adapters, params = adapted(tied)
    wider = {**params, "embedding": jnp.zeros((WORDS + 1, WIDTH))}
    with pytest.raises(ValueError, match="of a vocabulary of 11, but the leaf has 12"):
        lorax.merge(adapters, wider)
