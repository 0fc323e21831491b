"""A model with adapters that are not merged, so that a quantised base stays packed."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import lorax
from lorax.types import Adapters


class Unmerged(NamedTuple):
    """Takes the place of plain parameters, for a function made by `either`.

    Attributes:
      adapters: by path; {} for the base alone.
      params: the base, some leaves of which may be quantised.
      start: the adapters that training began with; {} if they changed nothing.
    """

    adapters: Adapters
    params: Any
    start: Adapters = {}

    def at_start(self) -> "Unmerged":
        """Returns the model that training began with, on the same base."""
        return Unmerged(self.start, self.params)


def either(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of plain parameters take `Unmerged` ones as well."""
    adapted = lorax.adapt(fn, custom_rules="branch")

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(params, Unmerged):
            return adapted(params.adapters, params.params, *args, **kwargs)
        return fn(params, *args, **kwargs)

    return call
