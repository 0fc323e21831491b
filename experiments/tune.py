"""Finds each method's learning rate: `lorax tune --config=...`.

Sweeps geometrically over full-length runs of the config and judges them on the
`selection` documents, which no reported figure uses. A sweep whose best rate is at an
end is extended until the optimum is bracketed. Prints a table and writes `sweep.json`;
you then write the winners into the config by hand, with the sweep in its docstring.
"""

import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from experiments.reading import command

_CONFIG = config_flags.DEFINE_config_file("config", None, command.CONFIG)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for `sweep.json`; `runs/<run.name>-tune` by default."
)
_FACTOR = flags.DEFINE_float("factor", 2.0, "Ratio of neighbouring learning rates.")
_RUNS = flags.DEFINE_integer("runs", 9, "Maximum learning rates per method.")


def main(argv: Sequence[str]) -> None:
    """Sweeps every method of the config."""
    del argv
    # jax loads only once the flags are right
    from experiments.reading import checking
    from experiments.search import tuning

    config = _CONFIG.value
    with command.refusing():
        checking.check(config)
    folder = pathlib.Path(_WORKDIR.value or f"runs/{config.run.name}-tune")
    tuning.tune(config, folder, factor=_FACTOR.value, most=_RUNS.value)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command.run(main)
