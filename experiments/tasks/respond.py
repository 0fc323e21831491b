"""Prompts and responses for a causal model: E2E, or rows of instructions.

The loss is on the response and its EOS only. For E2E's test prompts, responses are
generated and scored by BLEU, NIST and ROUGE-L; `test.jsonl` then has every prompt, the
generated text, and the references.
"""

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from experiments.data import batches, examples, packing, tokenization
from experiments.data.sources import e2e, instruction, paths
from experiments.generation import continuations, unmerged
from experiments.machine import disk, distributed, placement
from experiments.tasks import base, distillation, losses
from experiments.tasks.base import Scores, Task
from experiments.tasks.scoring import bits, overlap
from lorax.models import sampling


def make_respond(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    place: placement.Place = placement.ALONE,
) -> Task:
    """Returns the task of `config.data`, for a causal model."""
    data, lengths = config.data, config.data.lengths
    pad = tokenization.padding_id(tokenizer)
    valid = encode(data, tokenizer, "valid", data.valid_rows)
    chunk = config.run.loss_chunk
    judged, own = config.eval.batch_size, place.part(config.eval.batch_size)
    routers = losses.Routers(config.run.router_loss, config.run.router_z_loss)
    loss_fn = losses.make_causal(model, config.run.label_smoothing, chunk, routers)
    teacher = distillation.Teacher()
    if config.run.loss == distillation.NAME:
        loss_fn, teacher = distillation.make(config, model, tokenizer, place)

    def held_out(rows: int) -> list[batches.Batch]:
        return batches.evaluation_batches(valid[:rows], judged, lengths, pad, part=own)

    bits_per_byte = make_bits_per_byte(losses.make_causal(model, chunk=chunk), place)
    some = base.asked(config.eval.rows, valid)
    final = base.asked(config.eval.final_rows, valid)

    def scored(params: Any, rows: int) -> Scores:
        return {f"valid_bpb_{rows}": bits_per_byte(params, held_out(rows))}

    def report(params: Any, folder: pathlib.Path) -> Scores:
        whole = scored(params, final)
        if not config.eval.test or data.task != "e2e":
            return whole
        return whole | write_test(config, model, tokenizer, params, folder)

    train = encode(data, tokenizer, "train", data.train_rows)
    how = {"seed": config.run.seed, "part": place.part(data.batch_size)}
    if data.packed:
        made = packing.packed_batches(train, data.batch_size, max(lengths), pad, **how)
    else:
        made = batches.training_batches(train, data.batch_size, lengths, pad, **how)
    return Task(made, loss_fn, lambda params: scored(params, some), report, *teacher)


def encode(
    data: ml_collections.ConfigDict,
    tokenizer: tokenization.Tokenizer,
    split: str,
    rows: int = 0,
) -> Sequence[examples.Example]:
    """Returns the first `rows` of a split as tokens; 0: all."""
    pairs = read_pairs(data, split)[: rows or None]
    found = examples.encode_pairs(tokenizer, pairs, max(data.lengths), split)
    if found.truncated:
        logging.warning("%s: %d responses cut short", split, found.truncated)
    return found.examples


def read_pairs(data: ml_collections.ConfigDict, split: str) -> Sequence[examples.Pair]:
    """Returns the prompts and responses of a split, "train" or "valid".

    If `data.valid` is "", the last tenth of the training table is held out.
    """
    if data.task == "e2e":
        found: Any = e2e.load(split, data.form)
    else:
        path = paths.find(data[split] or data.train)
        found = instruction.read_pairs(path, data.template)
    if found.malformed:
        logging.warning("%s: %d malformed rows", split, len(found.malformed))
    if data.task == "e2e" or data.valid:
        return found.pairs
    kept = len(found.pairs) - math.ceil(len(found.pairs) / 10)
    if not kept:
        raise ValueError(
            f"{path} has one good row, and a tenth of the rows is held out; give more "
            "rows, or data.valid"
        )
    return found.pairs[:kept] if split == "train" else found.pairs[kept:]


def make_bits_per_byte(
    loss_fn: Any, place: placement.Place = placement.ALONE
) -> Callable[[Any, Sequence[Any]], float]:
    """Returns `evaluate(params, batches)`: all nats over all bytes."""
    jitted = jax.jit(unmerged.either(lambda params, batch: loss_fn(params, batch)[1]))

    def evaluate(params: Any, held_out: Sequence[Any]) -> float:
        found = [jitted(params, place.put(batch)) for batch in held_out]
        rows = jax.device_get(found)
        nats = sum(float(row["nats"]) for row in rows)
        return bits.bits_per_byte(nats, sum(int(row["bytes"]) for row in rows))

    return evaluate


def write_test(
    config: ml_collections.ConfigDict,
    model: Any,
    tokenizer: tokenization.Tokenizer,
    params: Any,
    folder: pathlib.Path,
) -> Scores:
    """Generates responses to the test prompts, scores them and writes them down."""
    form = config.data.form
    groups = e2e.groups(e2e.load("test", form).pairs)[: config.eval.test]
    write = continuations.make_writer(
        model,
        tokenizer,
        [group.prompt for group in groups],
        config.eval.max_tokens,
        batch=config.eval.batch_size,
        rule=sampling.Rule(no_repeat=config.eval.no_repeat),
        beams=config.eval.beams,
        length_penalty=config.eval.length_penalty,
    )
    texts = [text.strip() for text in write(params)]
    rows = [
        {"prompt": group.prompt, "text": text, "references": group.references}
        for group, text in zip(groups, texts, strict=True)
    ]
    if distributed.is_primary():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        disk.replace(folder / "test.jsonl", lines)
    references = [group.references for group in groups]
    scores = overlap.generation_scores(texts, references, e2e.TOKENIZE[form])
    return {"test_prompts": len(groups), **scores}
