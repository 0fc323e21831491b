"""Initialisations: `(key, kernel, target, stats) -> (adapter, kernel)`."""

from lorax.inits.standard import standard

INITS = {"standard": standard}
"""Init by the name that `Target.init` gives."""

__all__ = ["INITS", "standard"]
