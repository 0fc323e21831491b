"""Decoding against transformers, alone and in a batch, with stops and adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.interop import hf
from lorax.models import beam, decoding, llama, sampling
from tests.data_paths import DATA, needs_data
from tests.programs import counted

pytestmark = pytest.mark.once

PROMPTS = [[1, 5, 9, 33], [1, 40], [1, 7, 7, 7, 12, 60, 3], [1, 11, 20]]
CONFIG = llama.Config(61, 64, 32, 2, 4, 2, 8, 48, windows=(6, 6), tied=True)


@pytest.fixture(scope="module")
def tiny():
    """A model with a window and well-spread logits."""
    model = llama.Model(CONFIG)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    return model, jax.tree.map(lambda x: x * (8.0 if x.ndim > 1 else 1.0), params)


def uncached(model, params, prompt, count):
    """Greedy tokens, rereading the whole sequence for each."""
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, : len(prompt)] = prompt
    read = jax.jit(lambda t: model.apply({"params": params}, t)[0])
    for i in range(len(prompt), len(prompt) + count):
        tokens[0, i] = read(tokens)[i - 1].argmax()
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


def test_cached_is_uncached_and_a_batch_is_one_by_one(tiny):
    model, params = tiny
    traces, engine = [], decoding.causal(model, slots=48)

    def count(function):
        wrapped, own = counted(function)
        traces.append(own)
        return wrapped

    engine = engine.map(count)
    generate = decoding.make_generate(engine, batch=3, bucket=8)
    together = generate((params,), PROMPTS, 20)
    assert list(map(len, traces)) == [1, 1]  # prefill and step, for two batches
    for prompt, found in zip(PROMPTS, together):
        assert found == uncached(model, params, prompt, 20)
        assert generate((params,), [prompt], 20) == [found]
    assert list(map(len, traces)) == [1, 1]
    generate((params,), [list(range(3, 15))], 7)
    assert list(map(len, traces)) == [2, 1]  # another bucket: one more prefill


def test_a_sequence_ends_with_any_of_its_end_tokens(tiny):
    model, params = tiny
    engine = decoding.causal(model, slots=48)
    whole = decoding.make_generate(engine, batch=4, bucket=8)((params,), PROMPTS, 20)
    eos = (whole[0][4], whole[1][7])
    short = decoding.make_generate(engine, batch=4, bucket=8, eos=eos)
    for long, found in zip(whole, short((params,), PROMPTS, 20)):
        ends = [i for i, token in enumerate(long) if token in eos]
        assert found == (long[: ends[0]] if ends else long)


def test_stops_are_asked_of_each_sequence(tiny):
    model, params = tiny
    generate = decoding.make_generate(
        decoding.causal(model, slots=48), batch=4, bucket=8, chunk=3
    )
    whole, asked = generate((params,), PROMPTS, 20), []

    def stop(tokens):
        asked.append(len(tokens))
        pair = whole[0][5:7]
        at = [i for i in range(len(tokens) - 1) if tokens[i : i + 2] == pair]
        return at[0] if at else None

    found = generate((params,), PROMPTS, 20, stop=stop)
    cut = next(i for i in range(19) if whole[0][i : i + 2] == whole[0][5:7])
    assert found[0] == whole[0][:cut]
    assert max(asked) == 20 or all(len(f) < 20 for f in found)

    def first_only(tokens):  # the others go on
        return len(tokens) if tokens == whole[0][: len(tokens)] else None

    assert generate((params,), PROMPTS, 20, stop=first_only)[0] == whole[0][:3]


def test_sampling_is_seeded_and_blind_to_neighbours(tiny):
    model, params = tiny
    rule = sampling.Rule(temperature=1.0, top_k=20, top_p=0.9)
    generate = decoding.make_generate(
        decoding.causal(model, slots=48), batch=4, bucket=8, rule=rule
    )
    key = jax.random.key(3)
    one = generate((params,), PROMPTS, 12, key)
    assert one == generate((params,), PROMPTS, 12, key)
    assert one != generate((params,), PROMPTS, 12, jax.random.key(4))
    others = [PROMPTS[0], [1, 2, 3], PROMPTS[2], [9]]
    again = generate((params,), others, 12, key)
    assert again[0] == one[0] and again[2] == one[2]
    same = generate((params,), [PROMPTS[0]] * 4, 12, key)
    assert len({tuple(tokens) for tokens in same}) > 1
    with pytest.raises(ValueError, match="sampling needs a key"):
        generate((params,), PROMPTS, 12)


def test_the_rule_draws_from_the_nucleus():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)
    many = jnp.broadcast_to(logits, (4000, 4))

    def shares(**rule):
        drawn = sampling.Rule(**rule).choose(keys, many)
        return np.bincount(drawn, minlength=4) / 4000

    close = dict(atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.3, 0.15, 0.05], **close)
    np.testing.assert_allclose(
        shares(temperature=1.0, top_p=0.79), [0.625, 0.375, 0, 0], **close
    )
    np.testing.assert_allclose(
        shares(temperature=1.0, top_k=3), np.array([0.5, 0.3, 0.15, 0]) / 0.95, **close
    )
    hot = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(shares(temperature=2.0), hot / hot.sum(), **close)
    assert shares(temperature=1.0, top_p=1e-6)[0] == 1.0
    assert shares()[0] == 1.0


def test_no_sequence_comes_twice():
    history = jnp.array([[5, 6, 7, 5, 6, 0], [6, 7, 5, 5, 6, 0], [0, 0, 5, 6, 5, 0]])
    real = jnp.array([[1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]) > 0
    index = jnp.int32(5)
    banned = lambda n: [
        np.flatnonzero(row).tolist()
        for row in sampling.Rule(no_repeat=n).banned(history, real, index, 9)
    ]
    assert banned(0) == [[], [], []]
    assert banned(1) == [[5, 6, 7], [5, 6], [5, 6]]
    assert banned(2) == [[7], [], [6]]  # row 1: the 7 after its first 6 is padding
    assert banned(3) == [[7], [], []]
    assert banned(7) == [[], [], []]


def test_adapters_unmerged_and_one_for_each_row(tiny):
    model, params = tiny
    target = lorax.Target(".*/(q|down)/kernel", rank=2, init="gaussian")
    loss = lambda p, t: model.apply({"params": p}, t).sum()
    kernels = lorax.discover(loss, params, jnp.zeros((1, 4), int))
    many = []
    for seed in range(3):
        made, _ = lorax.init(jax.random.key(seed), params, [target], kernels)
        key = jax.random.key(10 + seed)
        many.append(jax.tree.map(lambda x: jax.random.normal(key, x.shape), made))
    engine = decoding.causal(model, slots=32)
    merged = decoding.make_generate(engine, batch=1, bucket=8)
    alone = [
        merged((lorax.merge(adapters, params),), [prompt], 8)[0]
        for adapters, prompt in zip(many, PROMPTS)
    ]
    adapted = decoding.make_generate(engine.map(lorax.adapt), batch=3, bucket=8)
    assert adapted((many[0], params), PROMPTS[:1], 8) == alone[:1]
    assert len({tuple(tokens) for tokens in alone}) == 3

    routed = decoding.per_example(engine).map(lorax.compose.route)
    mixed = decoding.make_generate(routed, batch=3, bucket=8)
    stacked, index = lorax.compose.stack(many), jnp.array([2, 0, 1])
    prompts = [PROMPTS[i] for i in index]
    assert mixed((stacked, index, params), prompts, 8) == [alone[i] for i in index]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1] * 20], 30, r"24 tokens .*max_tokens=30 overflow a cache of 48 slots"),
    ],
)
def test_what_does_not_fit_is_said(tiny, prompts, count, message):
    model, params = tiny
    generate = decoding.make_generate(decoding.causal(model, 48), batch=2, bucket=8)
    with pytest.raises(ValueError, match=message):
        generate((params,), prompts, count)


def test_a_model_with_learnt_positions_ends_at_the_last():
    from lorax.models import gpt2

    model = gpt2.Model(gpt2.Config(61, 16, 16, 1, 2, 16))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    generate = decoding.make_generate(decoding.causal(model, 64), batch=1, bucket=8)
    assert len(generate((params,), [[1] * 6], 10)[0]) == 10
    with pytest.raises(ValueError, match="the model reads at most 16"):
        generate((params,), [[1] * 7], 10)


@pytest.mark.parametrize(
    "kwargs", [{"temperature": -1.0}, {"top_k": -1}, {"no_repeat": -1}]
)
def test_rules_are_checked(kwargs):
    with pytest.raises(ValueError, match="no number may be negative"):
        sampling.Rule(**kwargs)
    with pytest.raises(ValueError, match="probability in"):
        sampling.Rule(top_p=0.0)


@pytest.fixture(scope="module")
def stories():
    transformers = pytest.importorskip("transformers")
    source = DATA / "stories260k"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    return *hf.load(source), theirs


def prompts_of(count):
    """Beginnings of stories, 3 to 12 tokens each."""
    draw = np.random.default_rng(0)
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(DATA / "stories260k" / "tokenizer.json")
    )
    text = "Once upon a time there was a little dog who liked to play in the park. "
    ids = [t for t in tokenizer.encode(text * 3).ids if t > 2]
    return [
        [1, *ids[i : i + draw.integers(2, 12)]]
        for i in draw.integers(0, len(ids) - 12, count)
    ]


def theirs_of(theirs, prompt, count, **kwargs):
    import torch

    told = torch.tensor([prompt])
    with torch.no_grad():
        out = theirs.generate(
            told,
            attention_mask=torch.ones_like(told),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=kwargs.pop("eos"),
            bos_token_id=1,
            **kwargs,
        )[0, len(prompt) :].tolist()
    return out


@needs_data
@pytest.mark.parametrize(
    ("penalty", "no_repeat", "eos"),
    [
        (0.6, 3, [2, 13, 426]),
        pytest.param(1.0, 0, [2, 426], marks=pytest.mark.slow),
        pytest.param(0.0, 2, [426, 431], marks=pytest.mark.slow),
    ],
)
def test_beams_are_those_of_transformers(stories, penalty, no_repeat, eos):
    model, params, theirs = stories
    prompts = prompts_of(50)
    search = beam.make_search(
        decoding.causal(model, slots=48),
        batch=10,
        beams=4,
        eos=eos,
        bucket=16,
        length_penalty=penalty,
        no_repeat=no_repeat,
    )
    ours = search((params,), prompts, 24)
    lengths = set()
    for prompt, found in zip(prompts, ours):
        expected = theirs_of(
            theirs,
            prompt,
            24,
            num_beams=4,
            length_penalty=penalty,
            no_repeat_ngram_size=no_repeat,
            eos=eos,
        )
        while expected and expected[-1] in (*eos, 0):
            expected.pop()
        lengths.add(len(expected))
        assert found == expected
    assert len(lengths) > 1


@needs_data
def test_greedy_is_that_of_transformers(stories):
    model, params, theirs = stories
    prompts = prompts_of(8)
    generate = decoding.make_generate(
        decoding.causal(model, slots=112), batch=8, bucket=16, eos=(2,)
    )
    for prompt, found in zip(prompts, generate((params,), prompts, 96)):
        assert found == theirs_of(theirs, prompt, 96, eos=2)
