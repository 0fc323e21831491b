"""Writes continuations of texts with a causal model, greedily, sampled or by beams."""

from collections.abc import Callable, Sequence
from typing import Any

from experiments.data import examples, tokenization
from experiments.generation import unmerged
from lorax.models import beam, decoding, sampling

BUCKET = 32  # tokens; prompts are padded to a multiple


def stop_at(
    tokenizer: tokenization.Tokenizer, texts: Sequence[str]
) -> Callable[[list[int]], int | None] | None:
    """Returns a function that counts the tokens to keep before a stop text, or None.

    What is kept never holds a stop text, but may lack characters before it that belong
    to the same token.
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
    end_ids: Sequence[int] = (),
) -> Callable[..., list[str]]:
    """Returns `write(params, key=None) -> continuations`, compiled for the prompts.

    The parameters are plain, or `unmerged.Unmerged`.

    Args:
      model: a causal model.
      tokenizer: the model's tokenizer.
      prompts: texts.
      max_tokens: maximum number of new tokens for each.
      batch: prompts at a time.
      rule: how a token is chosen; a beam search uses only its `no_repeat`.
      beams: more than 1 for a beam search.
      length_penalty: of the beam search.
      stop: texts that end a continuation; not with beams.
      end_ids: tokens that end a continuation like the tokenizer's EOS, such as a
        chat's; see `experiments.data.chat.templates.turn_ends`.

    Raises:
      ValueError: a prompt without tokens, or stop texts or a temperature with beams.
    """
    ids = [examples.prompt_ids(tokenizer, prompt) for prompt in prompts]
    slots = -(-max(map(len, ids)) // BUCKET) * BUCKET + max_tokens
    engine = decoding.causal(model, slots).map(unmerged.either)
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    eos = tuple(dict.fromkeys((*own, *end_ids)))
    pad = tokenization.padding_id(tokenizer)
    if beams > 1:
        if stop or rule.temperature:
            raise ValueError("stop and temperature do not apply to a search by beams")
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
        return lambda params, key=None: list(
            map(tokenizer.decode, search((params,), ids, max_tokens))
        )
    generate = decoding.make_generate(
        engine, batch=batch, eos=eos, pad=pad, bucket=BUCKET, rule=rule
    )
    ends = stop_at(tokenizer, stop)
    return lambda params, key=None: list(
        map(tokenizer.decode, generate((params,), ids, max_tokens, key, ends))
    )
