"""Optional libraries: imported on first use, or an error says how to install them."""

import importlib
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
    """Imports an optional library.

    Args:
      module: its import name.
      extra: the extra of this package that installs it.
      purpose: what needs it, for the error.

    Raises:
      ImportError: it is not installed; the message has the command that installs it.

    Example:
      >>> require("json", "interop", "this line").dumps([1])
      '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(
            f"{purpose} needs `{module}`, which is not installed: "
            f"`pip install -e '.[{extra}]'` at the root of the repository."
        ) from e
