"""Packages of somebody else's, imported by name before anything is built.

    config.run.plugins = ("my_package.methods",)

Such a module registers what it has when it is imported: `lorax.adapters.register`,
`lorax.inits.register`, `experiments.trainer.optimizers.register`. Names of the config
reach it then: `config.adapter.adapter`, `config.adapter.init`, `config.optimizer.name`.
"""

import importlib
from collections.abc import Iterable

import ml_collections


def load(config: ml_collections.ConfigDict) -> None:
    """Imports what `config.run.plugins` names; see `import_all`."""
    import_all(config.run.get("plugins", ()), "config.run.plugins")


def import_all(names: Iterable[str], where: str) -> None:
    """Imports modules by name; once imported, a module is not run again.

    Args:
      names: dotted names, such as "my_package.methods".
      where: what holds them, for the error.

    Raises:
      ValueError: the module cannot be found.
      RuntimeError: it failed as it was imported; why, is the error behind this one.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            missing = getattr(error, "name", None) or ""
            if isinstance(error, ModuleNotFoundError) and name.startswith(missing):
                raise ValueError(
                    f"{where}: no module {missing!r} was found for {name!r}; give the "
                    "dotted name of one that is installed, or that lies below the "
                    "folder from which the command runs or one in PYTHONPATH"
                ) from error
            raise RuntimeError(
                f"{where}: importing {name!r} failed: {type(error).__name__}: {error}"
            ) from error
