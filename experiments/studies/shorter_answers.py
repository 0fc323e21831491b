"""What preferences teach: SmolLM2 learns to be brief from pairs that a rule made.

    python -m experiments.studies.shorter_answers \
        --study_dir=docs/results/shorter_answers \
        --study_model=SmolLM2-135M-Instruct.Q4_1.gguf

Of two E2E references for one meaning representation, the shorter one is preferred if
both name every value and the longer one has at least half as many characters again. A
model with these preferences should write less without losing values. The rows are
written to a temporary folder; `--study_rows` writes them to a folder, and stops.

Every run is a line of `runs.jsonl`, so an interrupted study resumes.
"""

import functools
import hashlib
import itertools
import json
import pathlib
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags

from configs import smollm2_preferences_dpo
from experiments.data.chat import templates
from experiments.data.sources import e2e
from experiments.generation import continuations, loading, unmerged
from experiments.machine import disk, tables
from experiments.recipes import finetune
from experiments.studies.method import comparison

_MODEL = flags.DEFINE_string("study_model", None, "A GGUF file, or a checkpoint.")
_ROWS = flags.DEFINE_string("study_rows", None, "Write the rows there, and stop.")
_LOSSES = flags.DEFINE_list("study_losses", ["dpo", "simpo"], "Values of run.loss.")

SPLITS = {"train": ("train",), "valid": ("valid", "test")}
"""Splits of the rows -> the E2E splits that they come from, which share no prompts."""
LONGER = 1.5
"""Least characters of the rejected reference, as a multiple of the chosen one's."""
ASKED = "Describe this restaurant: "
WRITTEN, TOKENS = 40, 96
"""Number of held-out prompts to answer, and the most tokens of an answer."""


def values(prompt: str) -> dict[str, str]:
    """Returns the values in a meaning representation, by slot."""
    return dict(re.findall(r"(\w[\w ]*)\[([^\]]*)\]", prompt))


def named(text: str, said: dict[str, str]) -> float:
    """Returns the share of the values that a text names, ignoring case."""
    return statistics.mean(value.lower() in text.lower() for value in said.values())


def rows(groups: Sequence[e2e.Group]) -> list[dict[str, Any]]:
    """Returns preferences, leaving out meaning representations that give none.

    There are too many ways to say whether a place is for families to look them up:
    representations with that slot are left out.
    """
    found = []
    for group in groups:
        said = values(group.prompt)
        whole = [text for text in group.references if named(text, said) == 1]
        whole.sort(key=len)
        if "familyFriendly" in said or len(whole) < 2:
            continue
        if len(whole[-1]) >= LONGER * len(whole[0]):
            found.append(row(group.prompt, whole[0], whole[-1]))
    return found


def row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """Returns a row of JSON lines, as chats."""

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return {
        "prompt": message("user", ASKED + prompt.removesuffix(e2e.SEPARATOR)),
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
    }


def write_rows(folder: pathlib.Path) -> None:
    """Writes `train.jsonl` and `valid.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, sources in SPLITS.items():
        pairs = itertools.chain(*(e2e.load(s, "official").pairs for s in sources))
        made = rows(e2e.groups(pairs))
        lines = "".join(json.dumps(row) + "\n" for row in made)
        disk.replace(folder / f"{split}.jsonl", lines)
        print(f"{folder / split}.jsonl: {len(made)} rows")


def configured(
    source: str, loss: str, folder: pathlib.Path
) -> ml_collections.ConfigDict:
    """Returns the config of a run."""
    config = smollm2_preferences_dpo.get_config().unlock()
    config.model.source, config.run.loss = source, loss
    if loss != "dpo":
        config.run.loss_options = ()
    for split in SPLITS:
        config.data[split] = str(folder / f"{split}.jsonl")
    return config.lock()


def measured(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Makes one run: scores of held-out pairs and generated texts, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        results = finetune.run(config, folder)
        model, params, tokenizer = loading.load_base(config.model, jax.random.key(0))
        adapters, base = loading.load_adapters(f"{folder}/adapter", model, params)
    write = writer(config, model, tokenizer)
    texts = {
        "before": write(unmerged.Unmerged({}, params)),
        "after": write(unmerged.Unmerged(adapters, base)),
    }
    return {
        "curve": [results["valid_rewards/margins"]],
        "scores": {k: v for k, v in results.items() if isinstance(v, int | float)},
        "written": {when: told(config, found) for when, found in texts.items()},
        "example": {when: found[0] for when, found in texts.items()},
    }


def writer(
    config: ml_collections.ConfigDict, model: Any, tokenizer: Any
) -> Callable[..., list[str]]:
    """Returns `write(params)`, which answers the first held-out prompts greedily."""
    template = templates.load(loading.find(config.model.source), tokenizer)
    ends = templates.turn_ends(tokenizer, template)
    prompts = [
        template.render(row["prompt"], add_generation_prompt=True).text
        for row in held_out(config)
    ]
    return continuations.make_writer(
        model,
        tokenizer,
        prompts,
        TOKENS,
        batch=config.eval.batch_size,
        end_ids=ends.ids,
        stop=ends.texts,
    )


def held_out(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """Returns the rows whose prompts are answered."""
    return list(disk.read_lines(pathlib.Path(config.data.valid)))[:WRITTEN]


def told(config: ml_collections.ConfigDict, texts: Sequence[str]) -> dict[str, float]:
    """Returns mean characters of texts, and the share of values that they name."""
    prompts = [row["prompt"][0]["content"] for row in held_out(config)]
    pairs = [(text.strip(), values(p)) for text, p in zip(texts, prompts, strict=True)]
    return {
        "characters": statistics.mean(len(text) for text, _ in pairs),
        "named": statistics.mean(named(*pair) for pair in pairs),
    }


def table(lines: dict[str, dict[str, Any]]) -> str:
    """Returns markdown with held-out scores before and after, with a row per loss."""
    cells = []
    for loss, line in lines.items():
        scores, written = line["scores"], line["written"]

        def both(form: str, name: str, scores: Any = scores) -> str:
            now, then = scores[f"valid_{name}"], scores[f"base_valid_{name}"]
            return f"{then:{form}} / {now:{form}}"

        def texts(form: str, name: str, written: Any = written) -> str:
            return " / ".join(f"{written[w][name]:{form}}" for w in ("before", "after"))

        cells.append(
            [
                loss,
                both(".3f", "loss"),
                both(".3f", "rewards/margins"),
                both(".1%", "rewards/accuracies"),
                both(".1f", "logps/chosen"),
                both(".1f", "logps/rejected"),
                texts(".0f", "characters"),
                texts(".1%", "named"),
            ]
        )
    names = ["loss", "its value", "margin", "accuracy", "log p chosen", "rejected"]
    return tables.markdown([*names, "characters", "values named"], cells)


def main(argv: Sequence[str]) -> None:
    """Writes the rows, or resumes the study and prints the table."""
    del argv
    if _ROWS.value:
        write_rows(pathlib.Path(_ROWS.value))
        return
    folder, losses = comparison.folder("shorter_answers"), _LOSSES.value
    with tempfile.TemporaryDirectory() as made:
        write_rows(pathlib.Path(made))
        configs = {
            loss: configured(_MODEL.value or "", loss, pathlib.Path(made))
            for loss in losses
        }
        settings = {loss: _digest(config) for loss, config in configs.items()}
        runs = comparison.Runs(folder / "runs.jsonl", settings)
        lines = {
            loss: runs.line((loss,), functools.partial(measured, config))
            for loss, config in configs.items()
        }
    text = table(lines)
    disk.replace(folder / "table.md", f"{text}\n")
    print(text)


def _digest(config: ml_collections.ConfigDict) -> str:
    """Returns a digest of what a run depends on; the model counts by its name only."""
    kept = config.copy_and_resolve_references().unlock()
    kept.model.source = config.model.source.rpartition("/")[2]
    kept.data.train = kept.data.valid = ""
    return hashlib.sha256(kept.to_json_best_effort().encode()).hexdigest()[:16]


if __name__ == "__main__":
    flags.mark_flag_as_required("study_model")
    app.run(main)
