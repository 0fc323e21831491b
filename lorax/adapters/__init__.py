"""The parametrisations: frozen dataclasses whose array fields are all trainable."""

from lorax.adapters.adalora import AdaLora, orthogonal_penalty
from lorax.adapters.dora import Dora
from lorax.adapters.full import Full
from lorax.adapters.lora import Lora
from lorax.adapters.plain import as_lora
from lorax.adapters.sliced import SlicedLora

CLASSES = {cls.__name__: cls for cls in (Lora, SlicedLora, Dora, AdaLora, Full)}
"""Class by name, for adapters read back from disk."""

__all__ = [
    "CLASSES",
    "AdaLora",
    "Dora",
    "Full",
    "Lora",
    "SlicedLora",
    "as_lora",
    "orthogonal_penalty",
]
