"""Guards the registries of adapters, inits and optimisers against name clashes."""

from __future__ import annotations

from typing import Any


def require_free(kind: str, name: str, held: Any, new: Any) -> None:
    """Raises ValueError if a name is registered to something else.

    An object of the same module and name passes: a module may be reloaded.

    Args:
      kind: the kind of object registered, for the message.
      name: the name to register under.
      held: what holds the name; None if it is free.
      new: what is to be registered.

    Example:
      >>> require_free("init", "pissa", None, print)
    """
    if held is not None and _home(held) != _home(new):
        raise ValueError(
            f"{kind} name {name!r} belongs to {'.'.join(_home(held))}; register "
            f"{_home(new)[1]} under another name"
        )


def _home(made: Any) -> tuple[str, str]:
    """The module and the name of a class or a function."""
    return getattr(made, "__module__", ""), getattr(made, "__qualname__", repr(made))
