"""Shared by the sweep tests: a toy config and its runs."""

from configs import quickstart
from experiments.search import combinations, grid

RATE = "optimizer.learning_rate.lora"


def config_of(**given):
    config = quickstart.get_config("runlocal")
    for name, value in given.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return config


def runs_of(text, config=None):
    config = config or config_of()
    return combinations.make_runs(config, grid.parse_grid(text, config))
