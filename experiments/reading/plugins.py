"""Plugins: a user's own modules, imported by name before anything is built.

    config.run.plugins = ("my_package.methods",)

On import, such a module registers what it offers: `lorax.adapters.register`,
`lorax.inits.register`, `experiments.trainer.optimizers.register`. The config can then
name it: `config.adapter.adapter`, `config.adapter.init`, `config.optimizer.name`.
"""

import importlib
from collections.abc import Iterable

import ml_collections


def load(config: ml_collections.ConfigDict) -> None:
    """Imports the modules in `config.run.plugins`; see `import_all`."""
    import_all(config.run.get("plugins", ()), "config.run.plugins")


def import_all(names: Iterable[str], where: str) -> None:
    """Imports modules by name; a module that is already imported does not run again.

    Args:
      names: dotted names, such as "my_package.methods".
      where: the field or flag that holds them, for the error.

    Raises:
      ValueError: a module cannot be found.
      RuntimeError: importing a module failed; the error behind this one says why.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            missing = getattr(error, "name", None) or ""
            if isinstance(error, ModuleNotFoundError) and name.startswith(missing):
                raise ValueError(
                    f"{where}: no module {missing!r} was found for {name!r}; give the "
                    "dotted name of one that is installed, or that is in the working "
                    "directory or on PYTHONPATH"
                ) from error
            raise RuntimeError(
                f"{where}: importing {name!r} failed: {type(error).__name__}: {error}"
            ) from error
