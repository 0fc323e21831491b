"""The command `lorax`, and the folders of programs and configs that it runs.

In a checkout `experiments/` and `configs/` lie beside this package, in an installed one
inside it. They are programs: their modules import each other as `experiments.data` and
`configs.common`, names that belong to whoever runs Python, so nothing installs them as
packages of their own. This package is apart from `lorax`, whose import loads jax: some
programs set flags of XLA before that, and `lorax --help` should not wait for it.
"""

import pathlib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE if (HERE / "experiments").is_dir() else HERE.parent
"""The folder that holds `experiments` and `configs`."""
CONFIGS = ROOT / "configs"

COMMANDS = {
    "run": "train as a config says",
    "sweep": "run a config over a grid of its fields",
    "tune": "find the learning rate of a config",
    "evaluate": "score a checkpoint, with or without adapters",
    "generate": "write text with a checkpoint and its adapters",
    "export": "merge adapters, or write them for PEFT, vLLM and llama.cpp",
    "describe": "say what adapters would train in a model, and what they leave out",
    "plan": "say what a run needs on a TPU that is not here",
    "report": "draw what a run did as one HTML page",
}
"""What each subcommand does."""


def module(command: str) -> str:
    """The module of a subcommand."""
    return f"experiments.{'main' if command == 'run' else command}"


def configs() -> list[str]:
    """The names of the configs that come with lorax."""
    hidden = {"__init__", "common"}
    return sorted(f.stem for f in CONFIGS.glob("*.py") if f.stem not in hidden)
