"""Adapts a Hugging Face checkpoint to prompts and responses, and scores what it writes.

    python -m experiments.main --config=configs/gpt2_e2e_lora.py:runlocal

The loss is on the response and its EOS alone. In the workdir: `metrics.jsonl`,
`adapter/` (`lorax.checkpoint.load_adapters`), `results.json`, and `test.jsonl` with
every test prompt, what was written, and its references.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
import rich.console

from experiments import factory, generate, metrics, optimizers, progress
from experiments import writer as writers
from experiments.data import batches, e2e, examples, paths, tokenization
from experiments.fit import Fit, fit
from experiments.scoring import bits, generation
from experiments.train import save_and_verify
from lorax.interop import hf
from lorax.models import sampling


class Data(NamedTuple):
    """Encoded splits, and the groups that generation is scored on."""

    train: Sequence[examples.Example]
    valid: Sequence[examples.Example]
    test: Sequence[e2e.Group]


def make_loss(model: Any, smoothing: float = 0.0) -> Callable[..., Any]:
    """Cross-entropy of the responses, `(params, batch) -> (mean nats, metrics)`.

    Args:
      model: tokens to logits.
      smoothing: share of the target that is spread over the vocabulary.
    """

    def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = model.apply({"params": params}, batch["inputs"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        weight = batch["weights"].sum()
        total = (nll * batch["weights"]).sum()
        told = {"weight": weight, "nats": total, "bytes": batch["bytes"].sum()}
        if smoothing:
            spread = -jax.nn.log_softmax(logits).mean(-1)
            mixed = (1 - smoothing) * nll + smoothing * spread
            total = (mixed * batch["weights"]).sum()
        return total / jnp.maximum(weight, 1), told

    return loss_fn


def make_bits_per_byte(loss_fn: Any) -> Callable[[Any, Sequence[Any]], float]:
    """Returns `evaluate(params, batches)`: all nats over all bytes."""
    jitted = jax.jit(lambda params, batch: loss_fn(params, batch)[1])

    def evaluate(params: Any, held_out: Sequence[Any]) -> float:
        rows = [jax.device_get(jitted(params, batch)) for batch in held_out]
        nats = sum(float(row["nats"]) for row in rows)
        return bits.bits_per_byte(nats, sum(int(row["bytes"]) for row in rows))

    return evaluate


def load_data(
    config: ml_collections.ConfigDict, tokenizer: tokenization.Tokenizer
) -> Data:
    """Reads the E2E splits and encodes them."""

    def encoded(split: str, rows: int) -> Sequence[examples.Example]:
        found = e2e.load(split, config.form)
        if found.malformed:
            print(f"e2e {split}: {len(found.malformed)} malformed rows left out")
        pairs = found.pairs[: rows or None]
        longest = max(config.lengths)
        return examples.encode_pairs(tokenizer, pairs, longest, split).examples

    test = e2e.groups(e2e.load("test", config.form).pairs)
    return Data(encoded("train", config.train_rows), encoded("valid", 0), test)


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Runs the whole experiment and returns the values of `results.json`.

    Args:
      config: as `configs/gpt2_e2e_lora.py` returns it.
      workdir: folder for everything that the run writes.
    """
    # ------------------------------------------------------------ model, data
    folder = pathlib.Path(workdir)
    console = rich.console.Console(soft_wrap=False)
    directory = hf.locate(find(config.model.source))
    model, base = hf.load(
        directory, dtype=config.model.dtype or None, remat=config.model.remat
    )
    tokenizer = tokenization.load(directory)
    vocabulary = model.config.vocabulary
    tokenization.require_vocabulary(tokenizer, vocabulary, "config.json")
    data = load_data(config.data, tokenizer)
    lengths, pad = config.data.lengths, tokenization.padding_id(tokenizer)
    held_out = lambda rows: batches.evaluation_batches(
        data.valid[:rows], config.eval.batch_size, lengths, pad
    )
    some = held_out(config.eval.rows)
    bits_per_byte = make_bits_per_byte(make_loss(model))

    with writers.Writer(folder) as writer, progress.bars(console) as bars:
        # ----------------------------------------------------------- training
        (method,) = config.run.methods
        done = fit(
            method,
            jax.random.fold_in(jax.random.key(config.run.seed), 1),
            make_loss(model, config.run.label_smoothing),
            base,
            factory.make_targets(method, config.adapter),
            optimizers.make_optimizer(
                config.optimizer.learning_rate[method],
                config.run.steps,
                config.optimizer,
            ),
            batches.training_batches(
                data.train, config.data.batch_size, lengths, pad, config.run.seed
            ),
            config.run.steps,
            clip_norm=config.optimizer.clip_norm,
            log_every=config.run.log_every,
            bars=bars,
            writer=writer,
            eval_every=config.eval.every,
            calibration_batches=config.adapter.calibration_batches,
            evaluate=lambda params: {"valid_bpb": bits_per_byte(params, some)},
        )
        # ------------------------------------------------------------- report
        merged, everything = done.merged(), held_out(len(data.valid))
        results: dict[str, Any] = {
            "steps": config.run.steps,
            "trainable": done.trainable,
            "trainable_share": done.trainable / metrics.size(base),
            "step_ms": done.step_ms,
            f"base_bpb_{config.eval.rows}": bits_per_byte(base, some),
            f"valid_bpb_{config.eval.rows}": done.evaluation["valid_bpb"],
            f"valid_bpb_{len(data.valid)}": bits_per_byte(merged, everything),
        }
        if config.eval.test:
            results |= write_test(config, model, tokenizer, done, data.test, folder)
        writer.write("final", config.run.steps, numbers(results))

    # ----------------------------------------------------------------- finish
    save_and_verify(folder / "adapter", done.adapters, done.params)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, value in results.items():
        console.print(f"{name:>16}  {value}", highlight=False)
    console.print(f"Written to {folder}: adapter/ metrics.jsonl results.json")
    return results


def write_test(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    done: Fit,
    groups: Sequence[e2e.Group],
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Answers every test prompt, by the merged model, and scores the answers."""
    groups = groups[: config.eval.test]
    write = generate.make_writer(
        model,
        tokenizer,
        [group.prompt for group in groups],
        config.eval.max_tokens,
        batch=config.eval.batch_size,
        rule=sampling.Rule(no_repeat=config.eval.no_repeat),
        beams=config.eval.beams,
        length_penalty=config.eval.length_penalty,
    )
    texts = [text.strip() for text in write((done.merged(),))]
    with open(folder / "test.jsonl", "w", encoding="utf-8") as file:
        for group, text in zip(groups, texts, strict=True):
            row = {"prompt": group.prompt, "text": text, "references": group.references}
            file.write(json.dumps(row) + "\n")
    references = [group.references for group in groups]
    scores = generation.generation_scores(
        texts, references, e2e.TOKENIZE[config.data.form]
    )
    return {"test_prompts": len(groups), **scores}


def find(source: str) -> str:
    """A checkpoint below the folder of data sets, if there is one; else as given."""
    below = paths.root() / source
    return str(below) if below.is_dir() else source


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """The values that a metrics writer takes."""
    return {k: float(v) for k, v in results.items() if isinstance(v, int | float)}
