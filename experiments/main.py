"""Trains from a config.

    lorax run --config=quickstart
    lorax run --config=my_config.py --config.adapter.rank=16 --workdir=runs/mine

A config is a Python file, or the name of one that comes with lorax. Any of its fields
can be overridden; one that it does not have is refused. In a checkout `python -m
experiments.main` is the same command.
"""

import pathlib
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments.reading import command

_CONFIG = config_flags.DEFINE_config_file("config", None, command.CONFIG)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for what the run writes; `runs/<run.name>` by default."
)


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are not flags: {argv[1:]}")
    # jax and flax load only once the flags are right
    from experiments.machine import distributed, memory, record
    from experiments.reading import fields

    config = _CONFIG.value
    with command.refusing():
        fields.require(config)
    memory.keep_on_cpu()
    if "heartbeat" in config.get("distributed", ()):
        distributed.initialize(config.distributed)  # before anything asks for devices
    from experiments.reading import checking
    from experiments.recipes import finetune, members
    from lorax.checkpoint import folders

    workdir = _WORKDIR.value or str(pathlib.Path("runs") / config.run.name)
    with command.refusing():
        checking.check(config)
        folders.require_directory(pathlib.Path(workdir))
    if distributed.is_primary():
        record.write(pathlib.Path(workdir), config)
    run = finetune.run if "source" in config.model else members.run
    run(config, workdir)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main)
