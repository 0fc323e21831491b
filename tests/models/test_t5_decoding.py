"""T5 generates what transformers' T5 does, greedily and with beams, for any prompt."""

import numpy as np
import pytest

from lorax.interop import hf
from lorax.models import beam, decoding
from tests.models import golden

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")
SIZES = {
    "vocab_size": 40,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "eos_token_id": 5,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES))
    golden.redraw(theirs, size=2.0)
    directory = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(directory)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(6, 40, n).tolist() for n in draw.integers(3, 20, 16)]
    return theirs, *hf.load(directory), prompts


def expected(theirs, prompt, **kwargs):
    told = torch.tensor([prompt])
    with torch.no_grad():
        out = theirs.generate(
            told,
            attention_mask=torch.ones_like(told),
            max_new_tokens=12,
            do_sample=False,
            **kwargs,
        )[0, 1:].tolist()
    return out[: out.index(5)] if 5 in out else [t for t in out if t]


def test_greedy_and_beams(made):
    theirs, model, params, prompts = made
    engine = decoding.sequence_to_sequence(model, slots=13)
    generate = decoding.make_generate(engine, batch=8, bucket=20, eos=(5,))
    found = generate((params,), prompts, 12)
    assert found == [expected(theirs, prompt) for prompt in prompts]
    assert len({len(tokens) for tokens in found}) > 1
    search = beam.make_search(engine, batch=8, beams=3, eos=(5,), bucket=20)
    for prompt, tokens in zip(prompts, search((params,), prompts, 12)):
        assert tokens == expected(theirs, prompt, num_beams=3)
