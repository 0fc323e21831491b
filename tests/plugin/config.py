"""The quickstart at toy size with the methods of this package: tests the wiring only.

python -m experiments.main --config=tests/plugin/config.py
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; `optimizer.momentum` is a field of the plugin's optimiser."""
    config = quickstart.get_config("runlocal")
    config.run.name = "plugin"
    config.run.methods = ("lora",)
    config.run.plugins = ("tests.plugin.methods",)
    config.adapter.adapter = "walsh"
    config.optimizer.name = "signum"
    config.optimizer.learning_rate.lora = 1e-3
    with config.unlocked():
        config.optimizer.momentum = 0.8
    return config
