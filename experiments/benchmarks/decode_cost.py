"""What a cache saves in decoding, and transformers' own beside it.

    python -m experiments.benchmarks.decode_cost --source=stories260k

Greedy decoding of a checkpoint, the same tokens by every row: with the cache; by one
jitted loop that reads the whole fixed-length sequence again for every token; and by
transformers' `generate` with its cache, where torch and transformers are installed. All
are interleaved in one run, compilation apart.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import paired
from experiments.data import examples
from experiments.generation import loading
from experiments.machine import tables, timing
from lorax.models import decoding

_SOURCE = flags.DEFINE_string("source", "stories260k", "The checkpoint.")
_NEW = flags.DEFINE_integer("new_tokens", 256, "Tokens to add.", lower_bound=1)
_BATCH = flags.DEFINE_integer(
    "decode_sequences", 1, "Sequences at a time.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("decode_rounds", 5, "Interleaved rounds.")

PROMPT = "Once upon a time"


def uncached(model: Any, prompt: Sequence[int], count: int) -> Callable[..., Any]:
    """Returns a jitted `(params, batch) -> tokens` that reads everything every time."""
    length = len(prompt) + count

    @functools.partial(jax.jit, static_argnums=1)
    def run(params: Any, batch: int) -> jax.Array:
        start = jnp.zeros((batch, length), jnp.int32).at[:, : len(prompt)].set(prompt)

        def add(i: jax.Array, tokens: jax.Array) -> jax.Array:
            logits = model.apply({"params": params}, tokens)
            best = jnp.take(logits, i - 1, axis=1).argmax(-1)
            return tokens.at[:, i].set(best.astype(jnp.int32))

        return jax.lax.fori_loop(len(prompt), length, add, start)

    return run


def transformers_model(source: str) -> Any:
    """The same checkpoint in transformers; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(loading.find(source))


def compare(source: str, count: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way, by round."""
    model, params, tokenizer = loading.load_model(source)
    prompt = examples.prompt_ids(tokenizer, PROMPT)
    engine = decoding.causal(model, len(prompt) + count)
    generate = decoding.make_generate(engine, batch=batch, bucket=len(prompt))
    again = uncached(model, prompt, count)

    def cached() -> Any:
        return generate((params,), [prompt] * batch, count)

    def whole() -> np.ndarray:
        return np.asarray(again(params, batch))

    ways: dict[str, Callable[[], Any]] = {"cached": cached, "uncached, jitted": whole}
    if (cached()[0]) != whole()[0, len(prompt) :].tolist():
        raise AssertionError("the two ways do not write the same tokens")
    theirs = transformers_model(source)
    if theirs is not None:
        import torch

        told = torch.tensor([prompt] * batch)
        ways["transformers, cached"] = functools.partial(
            theirs.generate,
            told,
            attention_mask=torch.ones_like(told),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
    return timing.interleave(ways, rounds)


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    seconds = compare(_SOURCE.value, _NEW.value, _BATCH.value, _ROUNDS.value)
    rows = [
        [
            name,
            f"{min(times):.3f}",
            f"{_NEW.value * _BATCH.value / min(times):.0f}",
            f"{min(times) / min(seconds['cached']):.1f}",
            f"{paired.ratio(times, seconds['cached']):.1f}",
        ]
        for name, times in seconds.items()
    ]
    header = ["way", "best s", "tokens/s", "best / cached", "median of paired ratios"]
    print(tables.caption(tables.about(("jax", "torch", "transformers"))) + "\n")
    print(f"{_NEW.value} new tokens, {_BATCH.value} sequences\n")
    print(tables.markdown(header, rows))


if __name__ == "__main__":
    app.run(main)
