"""What a cache saves in decoding, and what unmerged adapters cost.

    python -m experiments.benchmarks.decode_cost --source=stories260k
    python -m experiments.benchmarks.decode_cost --adapters=64 --decode_sequences=8

Greedy decoding of a checkpoint, with the same tokens from every way: with the cache; in
one jitted loop that reads the whole fixed-length sequence again for every token; and
with transformers' `generate` and its cache, if torch and transformers are installed.
With `--adapters`, instead: LoRA of rank 8 on every linear kernel, merged; beside the
base (`lorax.adapt`); and as that many sets in one stack, with each row routed to its
own (`compose.route`). All are interleaved in one run, without compilation.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import lorax
from experiments import paired
from experiments.data import examples
from experiments.generation import loading
from experiments.machine import tables, timing
from lorax import compose
from lorax.models import decoding

_SOURCE = flags.DEFINE_string("source", "stories260k", "The checkpoint.")
_NEW = flags.DEFINE_integer("new_tokens", 256, "Tokens to add.", lower_bound=1)
_BATCH = flags.DEFINE_integer(
    "decode_sequences", 1, "Sequences at a time.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("decode_rounds", 5, "Interleaved rounds.")

_ADAPTERS = flags.DEFINE_integer(
    "adapters", 0, "Adapter sets in the stack that rows are routed to; 0: none."
)

PROMPT = "Once upon a time"
RANK = 8
SPREAD = 0.02
"""Standard deviation of the noise on fresh factors, whose update would be zero."""


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
    """Returns the checkpoint in transformers; None if that is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(loading.find(source))


def compare(source: str, count: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every way, by round."""
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


def adapter_sets(model: Any, params: Any, prompt: Sequence[int], count: int) -> Any:
    """Returns `count` adapter sets, away from their init."""
    read = lambda params, tokens: model.apply({"params": params}, tokens)
    kernels = lorax.discover(read, params, jnp.array([prompt]))

    def one(key: jax.Array) -> Any:
        made, _ = lorax.init(key, params, [("all-linear", RANK)], kernels)
        leaves, structure = jax.tree.flatten(made)
        keys = jax.random.split(key, len(leaves))
        draw = lambda key, leaf: leaf + SPREAD * jax.random.normal(key, leaf.shape)
        return jax.tree.unflatten(structure, map(draw, keys, leaves))

    return [one(key) for key in jax.random.split(jax.random.key(0), count)]


def serve(
    source: str, count: int, batch: int, rounds: int, adapters: int
) -> dict[str, list[float]]:
    """Returns seconds of decoding with adapters merged, beside the base, and routed."""
    model, params, tokenizer = loading.load_model(source)
    prompt = examples.prompt_ids(tokenizer, PROMPT)
    sets = adapter_sets(model, params, prompt, adapters)
    index = jnp.arange(batch) % adapters
    plain = decoding.causal(model, len(prompt) + count)
    routed = decoding.per_example(plain).map(compose.route)
    states: dict[str, tuple[decoding.Engine, Any]] = {
        "merged": (plain, (lorax.merge(sets[0], params),)),
        "beside the base": (plain.map(lorax.adapt), (sets[0], params)),
        f"routed, {adapters} sets": (routed, (compose.stack(sets), index, params)),
    }

    def way(engine: decoding.Engine, state: Any) -> Callable[[], Any]:
        generate = decoding.make_generate(engine, batch=batch, bucket=len(prompt))
        return lambda: generate(state, [prompt] * batch, count)

    ways = {name: way(*both) for name, both in states.items()}
    first = {name: write()[0] for name, write in ways.items()}
    if any(written != first["merged"] for written in first.values()):
        raise AssertionError("the ways do not write the same tokens")
    return timing.interleave(ways, rounds)


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    asked = _SOURCE.value, _NEW.value, _BATCH.value, _ROUNDS.value
    sets = _ADAPTERS.value
    seconds = serve(*asked, sets) if sets else compare(*asked)
    base, *_ = seconds
    rows = [
        [
            name,
            f"{min(times):.3f}",
            f"{_NEW.value * _BATCH.value / min(times):.0f}",
            f"{min(times) / min(seconds[base]):.1f}",
            f"{paired.ratio(times, seconds[base]):.1f}",
        ]
        for name, times in seconds.items()
    ]
    header = ["way", "best s", "tokens/s", f"best / {base}", "median of paired ratios"]
    print(tables.caption(tables.about(("jax", "torch", "transformers"))) + "\n")
    print(f"{_NEW.value} new tokens, {_BATCH.value} sequences\n")
    print(tables.markdown(header, rows))


if __name__ == "__main__":
    app.run(main)
