"""Commands on a model in a GGUF file."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from configs import common
from experiments.generation import exporting, loading
from lorax import checkpoint
from tests import children
from tests.interop import gguf_files as made

pytestmark = pytest.mark.once

TOKENS = np.arange(24).reshape(2, 12) % made.VOCABULARY


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made.tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


def config_of(source, **fields):
    config = common.checkpoint_run()
    config.model.source = str(source)
    config.model.update(fields)
    return config


def test_a_config_names_the_file(file):
    model, params, tokenizer = loading.load_base(
        config_of(file, dtype="bfloat16").model, jax.random.key(0)
    )
    assert model.config.dtype == jnp.bfloat16 and model.config.layers == 2
    assert params["layers"]["up"]["kernel"].dtype == jnp.bfloat16
    assert tokenizer.eos_id == made.VOCABULARY - 1
    with pytest.raises(
        ValueError, match="config.model.labels=2: a model in a GGUF file"
    ):
        loading.load_base(config_of(file, labels=2).model, jax.random.key(0))


def test_codes_of_the_file_and_new_ones(file):
    blocks = {"file": (32, 32), ".*down.*=none,all-linear=int8": (None, 0)}
    for quantize, want in blocks.items():
        config = config_of(file, quantize=quantize)
        _, params, _ = loading.load_base(config.model, jax.random.key(0))
        leaves = [params["layers"][name]["kernel"] for name in ("down", "up")]
        assert tuple(getattr(leaf, "block", None) for leaf in leaves) == want


def test_a_mistyped_file_is_told_before_a_run(file):
    loading.check(str(file))
    near = file.with_name("tyni.gguf")
    with pytest.raises(
        FileNotFoundError, match="the file .*tyni.gguf does not exist; beside it: tiny"
    ):
        loading.check(str(near))
    with pytest.raises(FileNotFoundError, match="the file .*tyni.gguf does not exist"):
        loading.load_model(str(near))


def test_what_is_exported_is_the_merged_checkpoint(file, tmp_path):
    model, params, tokenizer = loading.load_model(str(file))
    forward = jax.jit(lambda p: model.apply({"params": p}, TOKENS))
    kernels = lorax.discover(forward, params)
    target = lorax.Target("layers/(q|down)/kernel", rank=2)
    adapters, _ = lorax.init(jax.random.key(0), params, [target], kernels)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    checkpoint.save_adapters(tmp_path / "own", adapters, params)
    exporting.export(str(file), str(tmp_path / "own"), str(tmp_path / "out"), "merged")
    again, read, same = loading.load_model(str(tmp_path / "out"))
    want = forward(lorax.merge(adapters, params))
    found = jax.jit(again.apply)({"params": read}, TOKENS)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(forward(params) - want).max() > 1e-2 * np.abs(want).max()
    assert same.encode("$%&12") == tokenizer.encode("$%&12")
    assert same.special_tokens == tokenizer.special_tokens
    assert "chat_template" in (tmp_path / "out" / "tokenizer_config.json").read_text()


def written(*arguments):
    """What `experiments.generate` prints."""
    command = [sys.executable, "-m", "experiments.generate", *arguments]
    done = subprocess.run(
        command,
        cwd=children.ROOT,
        env=children.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_prompt_is_continued(file):
    printed = written(f"--model={file}", "--prompt=$%&", "--max_tokens=4")
    assert printed.startswith("$%&") and len(printed) > len("$%&\n")


@made.needs_real_file
@pytest.mark.slow
def test_the_capital_of_france():
    prompt = "The capital of France is"
    told = written(
        f"--model={made.real_file()}", f"--prompt={prompt}", "--max_tokens=3"
    )
    assert told.startswith(f"{prompt} Paris.")
