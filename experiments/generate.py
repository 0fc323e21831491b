r"""Continues a prompt with a checkpoint and, if given, a lorax or PEFT adapter.

    lorax generate --model=../shared/data/stories260k \
        --prompt="Once upon a time" --max_tokens=200

A prompt is encoded as in training: the tokenizer's BOS once, then the text. Greedy by
default; `--temperature` samples, `--beams` searches. `--quantize=nf4` quantises the
linear kernels; adapters that were trained on a quantised base need the same format.
Prints the prompt and its continuation.
"""

from collections.abc import Sequence

import jax
from absl import app, flags

from experiments.generation import continuations, loading, unmerged
from experiments.reading import command, plugins
from lorax.models import sampling
from lorax.types import Adapters

_MODEL = flags.DEFINE_string("model", None, "Directory, GGUF file or hub id.")
_ADAPTER = flags.DEFINE_string("adapter", None, "Folder of lorax or PEFT adapters.")
_QUANTIZE = flags.DEFINE_string("quantize", "", "Format, as in config.model.quantize.")
_SCAN = flags.DEFINE_bool("scan", True, "The run's config.model.scan.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; repeatable.")
_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Maximum new tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of the sampling; 0: greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Likeliest tokens to sample from; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Probability mass to sample from.")
_BEAMS = flags.DEFINE_integer("beams", 1, "Width of the beam search; 1: none.")
_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "Exponent of the length that divides a beam's score."
)
_REPEAT = flags.DEFINE_integer("no_repeat", 0, "Length of n-grams not to repeat.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text to stop at; repeatable.")
_PLUGINS = flags.DEFINE_list("plugins", [], "Modules that register adapters.")
_SEED = flags.DEFINE_integer("sampling_seed", 0, "Seed of the sampling.")


def main(argv: Sequence[str]) -> None:
    """Loads, generates, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are not flags: {argv[1:]}")
    prompts: list[str] = _PROMPT.value or []
    model, params, tokenizer = loading.load_model(
        _MODEL.value or "", quantize=_QUANTIZE.value, scan=_SCAN.value
    )
    adapters: Adapters = {}
    if _ADAPTER.value:
        with command.refusing():
            plugins.import_all(_PLUGINS.value or [], "--plugins")
        adapters, params = loading.load_adapters(_ADAPTER.value, model, params)
    write = continuations.make_writer(
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
    )
    texts = write(unmerged.Unmerged(adapters, params), jax.random.key(_SEED.value))
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "prompt"])
    command.run(main)
