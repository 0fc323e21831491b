r"""Scores a checkpoint, with or without adapters, on the task of a config.

    lorax evaluate --config=gpt2_e2e_lora:runlocal \
        --evaluated=runs/gpt2_e2e_lora/adapter

Every validation example counts once, whatever the batch size; the test set is used only
if `config.eval.test` says so. Prints the scores and, with `--scores`, writes them.
"""

import json
import pathlib
import tempfile
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments.machine import disk
from experiments.reading import checking, command
from experiments.recipes import finetune

_CONFIG = config_flags.DEFINE_config_file("config", None, command.CONFIG)
_ADAPTER = flags.DEFINE_string(
    "evaluated", None, "Folder of adapters; without it, the base alone is scored."
)
_SCORES = flags.DEFINE_string("scores", None, "Where to write the scores as JSON.")


def main(argv: Sequence[str]) -> None:
    """Evaluates as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are not flags: {argv[1:]}")
    config = _CONFIG.value
    with command.refusing():
        checking.check(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(_SCORES.value).parent if _SCORES.value else scratch
        scores = finetune.score(config, _ADAPTER.value, pathlib.Path(folder))
    for name, value in scores.items():
        print(f"{name:>20}  {value}")
    if _SCORES.value:
        disk.replace(_SCORES.value, json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main)
