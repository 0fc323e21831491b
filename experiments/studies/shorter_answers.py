"""What preferences teach: SmolLM2 learns from pairs, made by rule, to be brief.

    python -m experiments.studies.shorter_answers \
        --study_dir=docs/results/shorter_answers \
        --study_model=SmolLM2-135M-Instruct.Q4_1.gguf

Of two references of E2E for one meaning representation the shorter one is preferred,
where both name every value and the longer one has half as many characters again. A
model that prefers them should write less and lose none of the values. The rows go into
`--study_rows` (by default a temporary folder), which alone writes them and stops.

Every run is a line of `runs.jsonl`, so a study that was cut short goes on.
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
_LOSSES = flags.DEFINE_list("study_losses", ["dpo", "simpo"], "Of run.loss.")

SPLITS = {"train": ("train",), "valid": ("valid", "test")}
"""Of the rows, and the splits of E2E that they come from; these share no prompts."""
LONGER = 1.5
"""x the characters of the chosen reference that the rejected one has at least."""
ASKED = "Describe this restaurant: "
WRITTEN, TOKENS = 40, 96
"""Held-out prompts that are answered, and the most tokens of an answer."""


def values(prompt: str) -> dict[str, str]:
    """What a meaning representation says, by its slots."""
    return dict(re.findall(r"(\w[\w ]*)\[([^\]]*)\]", prompt))


def named(text: str, said: dict[str, str]) -> float:
    """The share of the values that a text has, whatever the case."""
    return statistics.mean(value.lower() in text.lower() for value in said.values())


def rows(groups: Sequence[e2e.Group]) -> list[dict[str, Any]]:
    """Preferences of meaning representations, those left out that give none.

    Whether a place is for families is said in too many ways to be looked up: such
    representations are left out.
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
    """A row of JSON lines, as chats."""

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
    """The config of a run."""
    config = smollm2_preferences_dpo.get_config().unlock()
    config.model.source, config.run.loss = source, loss
    if loss != "dpo":
        config.run.loss_options = ()
    for split in SPLITS:
        config.data[split] = str(folder / f"{split}.jsonl")
    return config.lock()


def measured(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """One run: scores of held-out pairs, and of what is written, before and after."""
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
    """Returns `write(params)`: answers to the first held-out prompts, greedily."""
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
    """The rows whose prompts are answered."""
    return list(disk.read_lines(pathlib.Path(config.data.valid)))[:WRITTEN]


def told(config: ml_collections.ConfigDict, texts: Sequence[str]) -> dict[str, float]:
    """Mean characters of texts, and the share of the values that they name."""
    prompts = [row["prompt"][0]["content"] for row in held_out(config)]
    pairs = [(text.strip(), values(p)) for text, p in zip(texts, prompts, strict=True)]
    return {
        "characters": statistics.mean(len(text) for text, _ in pairs),
        "named": statistics.mean(named(*pair) for pair in pairs),
    }


def table(lines: dict[str, dict[str, Any]]) -> str:
    """Markdown: what is held out before and after, a row a loss."""
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
    """Writes the rows; or goes on with the study, and prints the table."""
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
    """Of what a run depends on; the model by its name, wherever it lies."""
    kept = config.copy_and_resolve_references().unlock()
    kept.model.source = config.model.source.rpartition("/")[2]
    kept.data.train = kept.data.valid = ""
    return hashlib.sha256(kept.to_json_best_effort().encode()).hexdigest()[:16]


if __name__ == "__main__":
    flags.mark_flag_as_required("study_model")
    app.run(main)
