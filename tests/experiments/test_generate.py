"""The command lines of generation and export, on the real checkpoint."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from configs import common
from experiments.generation import continuations, exporting, loading
from lorax import checkpoint
from lorax.interop import engines
from lorax.models import sampling
from tests import children
from tests.data_paths import DATA, needs_data
from tests.plugin import methods

pytestmark = [needs_data, pytest.mark.once]
BEGIN = "Once upon a time"


@pytest.fixture(scope="module")
def stories():
    return loading.load_model("stories260k")


@pytest.fixture(scope="module")
def adapters(stories):
    model, params, _ = stories
    targets = [lorax.Target(".*/(q|v|down)/kernel", rank=2)]
    loss = lambda p, t: model.apply({"params": p}, t).sum()
    kernels = lorax.discover(loss, params, jnp.zeros((1, 4), int))
    made, _ = lorax.init(jax.random.key(0), params, targets, kernels)
    draw = lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.tree.map(draw, made)


def test_the_documented_sample_word_for_word(stories):
    model, params, tokenizer = stories
    text = (DATA / "stories260k" / "stories260K.md").read_text().replace("\r", "")
    sample = text.split("-t 0.0\n")[1].split("\n```")[0]
    write = continuations.make_writer(model, tokenizer, [BEGIN], 256, batch=1)
    assert (BEGIN + write(params)[0]).startswith(sample)


def test_stop_texts_sampling_and_beams(stories):
    model, params, tokenizer = stories
    prompts = [BEGIN, "The little dog"]
    make = lambda **kwargs: continuations.make_writer(
        model, tokenizer, prompts, 40, batch=2, **kwargs
    )
    whole = make()(params)
    cut = make(stop=["Lily"])(params)
    assert "Lily" in whole[0] and "Lily" not in cut[0]
    assert whole[0].startswith(cut[0]) and len(cut[0]) > 10
    rule = sampling.Rule(temperature=1.0)
    one, other = (make(rule=rule)(params, jax.random.key(i)) for i in range(2))
    assert one != other
    assert len(make(beams=3)(params)) == 2
    # The end of a chat turn is another token that generation stops at.
    ids = tokenizer.encode(BEGIN + whole[0])[len(tokenizer.encode(BEGIN)) :]
    ended = make(end_ids=[ids[9]])(params)[0]
    assert ended == tokenizer.decode(ids[: ids.index(ids[9])]) != whole[0]
    with pytest.raises(ValueError, match="stop and temperature do not apply"):
        make(beams=3, stop=["x"])


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_what_is_exported_writes_the_same(stories, adapters, tmp_path, form):
    model, params, tokenizer = stories
    checkpoint.save_adapters(tmp_path / "own", adapters, params)
    target = tmp_path / form
    exporting.export("stories260k", str(tmp_path / "own"), str(target), form)
    tokens = np.arange(3, 43).reshape(2, 20)
    run = jax.jit(lambda p: model.apply({"params": p}, tokens))
    expected = run(lorax.merge(adapters, params))
    if form == "merged":
        _, again, same = loading.load_model(str(target))
        assert same.encode(BEGIN) == tokenizer.encode(BEGIN)
        np.testing.assert_array_equal(run(again), expected)
    else:
        read, _ = loading.load_adapters(str(target), model, params)
        found = engines.check(target, model.config)
        assert {verdict.engine for verdict in found} == {*engines.ENGINES}
        np.testing.assert_allclose(
            run(lorax.merge(read, params)), expected, rtol=1e-4, atol=1e-4
        )
    assert np.abs(run(params) - expected).max() > 0.1
    with pytest.raises(ValueError, match="the base's own folder"):
        exporting.export("stories260k", "x", str(DATA / "stories260k"), form)


def test_adalora_is_exported_without_its_pruned_triplets(stories, tmp_path):
    model, params, _ = stories
    targets = [lorax.Target(".*/(q|down)/kernel", rank=3, adapter="adalora")]
    loss = lambda p, t: model.apply({"params": p}, t).sum()
    kernels = lorax.discover(loss, params, jnp.zeros((1, 4), int))
    made, _ = lorax.init(jax.random.key(0), params, targets, kernels)
    kept = lambda path: jnp.array([0.0, 3.0, 0.0] if "q" in path else [1.0, 0.0, -2.0])
    trained = {
        path: a.replace(lam=jnp.broadcast_to(kept(path), a.lam.shape))
        for path, a in made.items()
    }
    own = str(tmp_path / "own")
    checkpoint.save_adapters(own, trained, params)
    for form in ("lorax", "peft"):
        to = str(tmp_path / form)
        exporting.export("stories260k", own, to, form, adalora_shrink=True)
        small, _ = loading.load_adapters(to, model, params)
        assert {p: a.rank for p, a in small.items()} == {
            p: 1 if "q" in p else 2 for p in trained
        }
        assert all(np.all(a.lam != 0) for a in small.values())
        merged, want = lorax.merge(small, params), lorax.merge(trained, params)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
            merged,
            want,
        )
    whole = str(tmp_path / "whole")
    exporting.export("stories260k", own, whole, "lorax")
    assert all(a.rank == 3 for a in checkpoint.load_adapters(whole).values())
    with pytest.raises(ValueError, match="a merged kernel has no triplets"):
        exporting.export("stories260k", own, whole, "merged", adalora_shrink=True)


def test_what_pissa_learnt_is_exported_for_the_original_base(stories, tmp_path):
    model, params, _ = stories
    targets = [lorax.Target(".*/(q|down)/kernel", rank=2, init="pissa")]
    loss = lambda p, t: model.apply({"params": p}, t).sum()
    kernels = lorax.discover(loss, params, jnp.zeros((1, 4), int))
    start, moved = lorax.init(jax.random.key(0), params, targets, kernels)
    trained = jax.tree.map(lambda x: 1.1 * x + 0.02, start)
    checkpoint.save_adapters(tmp_path / "adapter", trained, moved)
    checkpoint.save_adapters(tmp_path / "initial", start, moved)
    exporting.export(
        "stories260k", str(tmp_path / "adapter"), str(tmp_path / "out"), "merged"
    )
    tokens = np.arange(3, 43).reshape(2, 20)
    run = jax.jit(lambda p: model.apply({"params": p}, tokens))
    expected = run(lorax.merge(trained, moved))
    again = run(loading.load_model(str(tmp_path / "out"))[1])
    np.testing.assert_allclose(again, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(run(params) - expected).max() > 0.1


def test_a_run_whose_layers_are_no_stack(stories, tmp_path):
    """With `config.model.scan` off, each layer's kernel has its own adapter."""
    _, params, _ = stories
    config = common.checkpoint_run().model
    config.source, config.scan = "stories260k", False
    model, base, _ = loading.load_base(config, jax.random.key(0))
    target = lorax.Target(".*/(q|down)/kernel", rank=2)
    loss = lambda p, t: model.apply({"params": p}, t).sum()
    kernels = lorax.discover(loss, base, jnp.zeros((1, 4), int))
    made, _ = lorax.init(jax.random.key(0), base, target, kernels)
    made = jax.tree.map(lambda x: x + 0.1, made)
    assert "layers_0/q/kernel" in made
    own, to = str(tmp_path / "own"), str(tmp_path / "merged")
    checkpoint.save_adapters(own, made, base)
    exporting.export("stories260k", own, to, "merged", scan=False)
    _, again, _ = loading.load_model(to)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), again, params)
    tokens = np.arange(3, 43).reshape(2, 20)
    want = model.apply({"params": lorax.merge(made, base)}, tokens)
    found = stories[0].apply({"params": again}, tokens)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(KeyError, match="layers_0/.*nearest paths: 'layers/"):
        exporting.export("stories260k", own, to, "merged")


def command(module, *args):
    """Runs a command in a fresh process, in which nothing has been registered."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *args],
        cwd=children.ROOT,
        env=children.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_adapters_of_a_package_by_plugins(stories, tmp_path):
    """Both commands import what registers the class; the text is the merged model's."""
    model, params, tokenizer = stories
    target = lorax.Target(".*/(q|down)/kernel", 8, 16, adapter=methods.Walsh)
    loss = lambda p, t: model.apply({"params": p}, t).sum()
    kernels = lorax.discover(loss, params, jnp.zeros((1, 4), int))
    made, base = lorax.init(jax.random.key(0), params, target, kernels)
    draw = lambda x: jax.random.normal(jax.random.key(x.size), x.shape)
    made = jax.tree.map(draw, made)
    checkpoint.save_adapters(tmp_path / "own", made, base)
    own, merged = str(tmp_path / "own"), str(tmp_path / "merged")
    plugin = "--plugins=tests.plugin.methods"

    args = ("--base=stories260k", f"--trained={own}", f"--to={merged}")
    code, told = command("export", *args, plugin)
    assert code == 0, told
    want = lorax.merge(made, base)
    _, again, _ = loading.load_model(merged)
    jax.tree.map(np.testing.assert_array_equal, again, want)

    args = (f"--adapter={own}", f"--prompt={BEGIN}", "--max_tokens=24", plugin)
    code, told = command("generate", "--model=stories260k", *args)
    assert code == 0, told
    write = continuations.make_writer(model, tokenizer, [BEGIN], 24, batch=1)
    assert BEGIN + write(want)[0] in told
    assert BEGIN + write(params)[0] not in told
