"""Rewrites adapters whose init changed the base for the original base."""

from __future__ import annotations

from typing import Any

from lorax import compose
from lorax.adapters import Lora
from lorax.types import Adapters


def on_original(adapters: Adapters, initial: Adapters) -> Adapters:
    """Returns `compose.to_lora`, extended to DoRA, whose norm is of the same sum."""

    def plain(a: Any) -> Any:
        if "magnitude" not in a.roles:
            return a
        return Lora(a.a, a.b, a.scale, a.axes, a.dropout, a.layers, a.moved_by)

    found: dict[str, Any] = compose.to_lora(
        {path: plain(a) for path, a in adapters.items()},
        {path: plain(a) for path, a in initial.items() if path in adapters},
    )
    for path, own in dict[str, Any](adapters).items():
        if "magnitude" in own.roles:
            lora = found[path]
            found[path] = own.replace(
                a=lora.a, b=lora.b, scale=lora.scale, moved_by=lora.moved_by
            )
    return found


def refuse(adapters: Adapters) -> None:
    """Raises ValueError for an adapter that fits only the base that its init left."""
    for path, adapter in adapters.items():
        if moved_by := getattr(adapter, "moved_by", None):
            raise ValueError(
                f"{path}: {moved_by} moved part of the base's kernel into this "
                "adapter, so it is wrong on the original base; pass what lorax.init "
                "returned as initial=, or residual=True to write it for the moved base"
            )
