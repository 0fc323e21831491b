"""Continues a prompt with a Hugging Face checkpoint, and a lorax or PEFT adapter on it.

    python -m experiments.generate --model=../shared/data/stories260k \
        --prompt="Once upon a time" --max_tokens=200

A prompt is encoded as in training: the tokenizer's BOS once, then the text. Greedy by
default; `--temperature` samples, `--beams` searches. Prints prompt and continuation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags

import lorax
from experiments import loading
from experiments.data import examples, tokenization
from lorax.models import beam, decoding, sampling

_MODEL = flags.DEFINE_string("model", None, "Directory of a checkpoint, or a hub id.")
_ADAPTER = flags.DEFINE_string("adapter", None, "Folder of adapters, ours or PEFT's.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; repeatable.")
_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most new tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Tokens to choose among; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Probability mass to choose among.")
_BEAMS = flags.DEFINE_integer("beams", 1, "Beams of a search; 1: none.")
_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Exponent of a beam's length.")
_REPEAT = flags.DEFINE_integer("no_repeat", 0, "Length of sequences not to repeat.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text to end before; repeatable.")
_SEED = flags.DEFINE_integer("sampling_seed", 0, "Of the sampling.")

BUCKET = 32  # tokens; prompts are padded to a multiple


def stop_at(
    tokenizer: tokenization.Tokenizer, texts: Sequence[str]
) -> Callable[[list[int]], int | None] | None:
    """Returns how many tokens to keep, once one of the texts has come; None without.

    What is kept never holds a stop text, though it may lack what a token carried
    before one.
    """
    if not texts:
        return None

    def cut(tokens: list[int]) -> int | None:
        if not any(text in tokenizer.decode(tokens) for text in texts):
            return None
        for count in range(1, len(tokens) + 1):
            if any(text in tokenizer.decode(tokens[:count]) for text in texts):
                return count - 1
        return len(tokens)

    return cut


def make_writer(
    model: Any,
    tokenizer: tokenization.Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    batch: int,
    rule: sampling.Rule = sampling.GREEDY,
    beams: int = 1,
    length_penalty: float = 1.0,
    stop: Sequence[str] = (),
    adapted: bool = False,
) -> Callable[..., list[str]]:
    """Returns `write(state, key=None) -> the continuations`, compiled for the prompts.

    Args:
      model: a causal one.
      tokenizer: its own.
      prompts: texts.
      max_tokens: most new tokens of each.
      batch: prompts at a time.
      rule: how a token is chosen, without beams; of it, `no_repeat` also with beams.
      beams: more than 1 search.
      length_penalty: of a search.
      stop: texts that end a continuation; not with beams.
      adapted: `state` is `(adapters, params)`; else `(params,)`.

    Raises:
      ValueError: a prompt without tokens, stop texts or a temperature with beams.
    """
    ids = [examples.prompt_ids(tokenizer, prompt) for prompt in prompts]
    slots = -(-max(map(len, ids)) // BUCKET) * BUCKET + max_tokens
    engine = decoding.causal(model, slots)
    if adapted:
        engine = engine.map(lorax.adapt)
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    pad = tokenization.padding_id(tokenizer)
    if beams > 1:
        if stop or rule.temperature:
            raise ValueError("beams=... searches: neither stop nor temperature apply")
        search = beam.make_search(
            engine,
            batch=batch,
            beams=beams,
            eos=eos,
            pad=pad,
            bucket=BUCKET,
            length_penalty=length_penalty,
            no_repeat=rule.no_repeat,
        )
        return lambda state, key=None: list(
            map(tokenizer.decode, search(state, ids, max_tokens))
        )
    generate = decoding.make_generate(
        engine, batch=batch, eos=eos, pad=pad, bucket=BUCKET, rule=rule
    )
    ends = stop_at(tokenizer, stop)
    return lambda state, key=None: list(
        map(tokenizer.decode, generate(state, ids, max_tokens, key, ends))
    )


def main(argv: Sequence[str]) -> None:
    """Loads, generates, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    prompts: list[str] = _PROMPT.value or []
    model, params, tokenizer = loading.load_model(_MODEL.value or "")
    state: tuple[Any, ...] = (params,)
    if _ADAPTER.value:
        state = loading.load_adapters(_ADAPTER.value, model, params), params
    write = make_writer(
        model,
        tokenizer,
        prompts,
        _TOKENS.value,
        batch=len(prompts),
        rule=sampling.Rule(
            _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _REPEAT.value
        ),
        beams=_BEAMS.value,
        length_penalty=_PENALTY.value,
        stop=_STOP.value,
        adapted=len(state) > 1,
    )
    texts = write(state, jax.random.key(_SEED.value))
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "prompt"])
    app.run(main)
