"""The parametrisations: one frozen dataclass per adapter method."""

from lorax.adapters.adalora import AdaLora, orthogonal_penalty
from lorax.adapters.delora import DeLoRA
from lorax.adapters.dora import Dora
from lorax.adapters.full import Full
from lorax.adapters.hra import Hra
from lorax.adapters.ia3 import Ia3
from lorax.adapters.loha import LoHa
from lorax.adapters.lokr import LoKr
from lorax.adapters.lora import Lora
from lorax.adapters.lora_xs import LoraXs
from lorax.adapters.miss import MiSS
from lorax.adapters.oft import Oft
from lorax.adapters.parametrisation import (
    REGISTRY,
    Parametrisation,
    as_lora,
    bound,
    get,
    lent_out,
    name_of,
    of_target,
    register,
)
from lorax.adapters.randlora import RandLora
from lorax.adapters.rows import Rows
from lorax.adapters.sliced import SlicedLora
from lorax.adapters.vera import VeRA

__all__ = [
    "VeRA",
    "RandLora",
    "MiSS",
    "LoraXs",
    "DeLoRA",
    "REGISTRY",
    "AdaLora",
    "Dora",
    "Full",
    "Hra",
    "Ia3",
    "LoHa",
    "LoKr",
    "Lora",
    "Oft",
    "Parametrisation",
    "Rows",
    "SlicedLora",
    "as_lora",
    "bound",
    "get",
    "lent_out",
    "name_of",
    "of_target",
    "orthogonal_penalty",
    "register",
]
