"""The command `lorax`, and where the programs and configs that it runs are.

In a checkout `experiments/` and `configs/` are next to this package; once installed,
they are inside it. They are programs, not libraries: their modules import each other as
`experiments.data` and `configs.common`, and names this generic must not be installed as
top-level packages. This package is separate from `lorax`, whose import loads jax: some
programs set XLA flags before that, and `lorax --help` should not wait for it.
"""

import pathlib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE if (HERE / "experiments").is_dir() else HERE.parent
"""The folder that holds `experiments` and `configs`."""
CONFIGS = ROOT / "configs"

COMMANDS = {
    "run": "train from a config",
    "sweep": "run a config over a grid of its fields",
    "tune": "find the best learning rate for a config",
    "evaluate": "score a checkpoint, with or without adapters",
    "generate": "generate text with a checkpoint and its adapters",
    "export": "merge adapters, or write them for PEFT, vLLM and llama.cpp",
    "describe": "show what adapters would train in a model, and what they leave out",
    "plan": "estimate what a run needs on a TPU that you do not have",
    "report": "draw a finished run as one HTML page",
}
"""What each subcommand does."""


def module(command: str) -> str:
    """Returns the module of a subcommand."""
    return f"experiments.{'main' if command == 'run' else command}"


def configs() -> list[str]:
    """Returns the names of the configs that come with lorax."""
    hidden = {"__init__", "common"}
    return sorted(f.stem for f in CONFIGS.glob("*.py") if f.stem not in hidden)
