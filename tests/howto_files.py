"""Checks for `test_howto` of the how-to pages on other programs' files."""

import pathlib

import jax
import numpy as np

import lorax


def peft(scope):
    assert {a.rank for a in scope["loaded"].values()} == {4}  # twice the target's
    folder = pathlib.Path(scope["folder"])
    for file in ("adapter/adapter_config.json", "merged/config.json"):
        assert (folder / file).exists()
    moved, params = jax.tree.leaves(scope["moved"]), jax.tree.leaves(scope["params"])
    assert any((new != old).any() for new, old in zip(moved, params))


def peft_fields(scope):
    assert scope["config"].layers == 4
    assert scope["loaded"]["embed/embedding"].rows == (30, 31)
    for path, adapter in scope["adapters"].items():
        close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
        jax.tree.map(close, adapter, scope["loaded"][path])


def vocabulary(scope):
    """Old tokens keep their logits; each new token's logit is their mean."""
    start, old = np.asarray(scope["start"]), 30
    means = np.broadcast_to(start[..., :old].mean(-1, keepdims=True), (1, 4, 2))
    np.testing.assert_allclose(start[..., old:], means, atol=1e-5)
    assert type(scope["loaded"]["head/kernel"]) is lorax.adapters.Rows
    assert scope["merged"]["embed"]["embedding"].shape == (32, 16)


def gguf(scope):
    leaves = lorax.tree.flatten(scope["params"])
    is_quantized = lorax.quantized.is_quantized
    kept = {path for path, leaf in leaves.items() if is_quantized(leaf)}
    assert kept == scope["adapters"].keys() == scope["again"].keys()
    for path, adapter in scope["adapters"].items():
        jax.tree.map(np.testing.assert_array_equal, adapter, scope["again"][path])
    assert scope["files"]["tokenizer.json"]["model"]["type"] == "BPE"


def mixtures(scope):
    pair = scope["adapters"]["layers/experts/gate_up/kernel"]
    assert pair.a.shape == (2, 4, 16, 2) and pair.b.shape == (2, 4, 2, 2, 24)
    assert len(scope["adapters"]) == 6
    np.testing.assert_allclose(scope["shared"], scope["logits"], atol=1e-5)
    for change in scope["slopes"].values():  # in a fresh pair one factor has a gradient
        assert any(leaf.any() for leaf in jax.tree.leaves(change))


def maxtext_tunix(scope):
    params, adapters = scope["params"], scope["adapters"]
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
    jax.tree.map(close, params, scope["start"])
    merged = lorax.merge(adapters, params)
    jax.tree.map(close, lorax.merge(scope["back"], params), merged)
    jax.tree.map(close, lorax.merge(scope["same"], params), merged)
    assert (scope["rule"].rank, scope["wide"].rank) == (2, 4)


CHECKS = (mixtures, peft, peft_fields, vocabulary, gguf, maxtext_tunix)
