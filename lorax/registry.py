"""Who owns a registered name: an adapter, an init or an optimiser asks first."""

from __future__ import annotations

from typing import Any


def require_free(kind: str, name: str, held: Any, new: Any) -> None:
    """Raises ValueError where a name belongs to something else.

    The same module and name passes: a module may be loaded again.

    Args:
      kind: of what is registered, for the message.
      name: to register under.
      held: what has the name; None: it is free.
      new: what asks for it.

    Example:
      >>> require_free("init", "pissa", None, print)
    """
    if held is not None and _home(held) != _home(new):
        raise ValueError(
            f"{kind} name {name!r} belongs to {'.'.join(_home(held))}; register "
            f"{_home(new)[1]} under another"
        )


def _home(made: Any) -> tuple[str, str]:
    """The module and the name of a class or a function."""
    return getattr(made, "__module__", ""), getattr(made, "__qualname__", repr(made))
