"""How PEFT stores each parametrisation: one table entry for each.

An entry gives the type's name, the fields of `adapter_config.json` that affect what the
adapter computes, the names and shapes of a module's tensors, and their conversion to
our fields and back. Reading, checking, stacking, naming and writing are the same for
all: see `peft_tensors` and `peft_written`.

LoRA, DoRA and AdaLoRA are older than the table, support embeddings and tied heads, and
have their own rules in `peft_config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorax import adapters, untrusted
from lorax.interop.factors import Module
from lorax.interop.peft_base import Base

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class Place(NamedTuple):
    """One module, as the functions of a form see it.

    Attributes:
      name: the module's name.
      in_: number of input features.
      out: number of output features.
      given: the values of `Form.fields`, with patterns resolved for this module.
      kernel: returns the frozen kernel `[in, out]`, float32; None if not known.
      embedding: whether the module is an embedding; no type in the table adapts those.
      bias: whether the module has a bias.
    """

    name: str
    in_: int
    out: int
    given: Mapping[str, Any]
    kernel: Callable[[], np.ndarray] | None = None
    embedding: bool = False
    bias: bool = False


class Common(NamedTuple):
    """Frozen tensors that all modules share: VeRA's projections.

    Attributes:
      names: without "base_model.", such as "vera_A".
      shapes: their shapes for the modules of a file.
      load: converts them to arrays for `Base.frozen`, by name.
      save: converts frozen arrays to them, given modules and their places.
      repeated: True if PEFT's files repeat them for every module.
    """

    names: tuple[str, ...]
    shapes: Callable[[Sequence[Place]], Shapes]
    load: Callable[[Arrays], dict[str, np.ndarray]]
    save: Callable[[Sequence[Module], Sequence[Place], Arrays], dict[str, np.ndarray]]
    repeated: bool = False


class Form(NamedTuple):
    """How PEFT stores one parametrisation.

    Attributes:
      adapter: our registered name.
      peft_type: PEFT's name.
      fields: the config fields that affect the function, with their rules and PEFT's
        defaults.
      tensors: all possible suffixes of a module's name in the names of its tensors,
        such as ".vera_lambda_b" or ".oft_R.weight".
      shapes: returns the suffixes that a module has, and their shapes.
      load: converts these tensors, float32, to our fields, one axis for every word of
        `Field.dims` except "batch" (in and out flattened), and to static fields.
      save: converts one of our modules to tensors.
      config: returns the values of `fields` for one of our modules; if modules differ
        in one, its pattern records it, or else the adapters cannot be written.
      patterns: config fields that give modules individual values, and the field that
        each overrides: `{"rank_pattern": "r"}`.
      lists: those of `fields` that list the modules of a kind, and a test for the kind:
        such as IA3's "feedforward_modules". They are not part of `config`.
      fixed: config fields of which only one value is implemented. Most types have
        `{"bias": "none"}`.
      free: config fields that do not affect the function. Most types have
        "fan_in_fan_out", which PEFT sets itself.
      dropout: the config field for dropout on the branch's input; "" if there is none.
      conv1d: True if PEFT also adapts transformers' `Conv1D` (GPT-2).
      common: the tensors that all modules share; None if there are none.
    """

    adapter: str
    peft_type: str
    fields: Mapping[str, tuple[untrusted.Rule, Any]]
    tensors: tuple[str, ...]
    shapes: Callable[[Place], Shapes]
    load: Callable[[Arrays, Place], tuple[dict[str, np.ndarray], dict[str, Any]]]
    save: Callable[[Module, Place], dict[str, np.ndarray]]
    config: Callable[[Module], dict[str, Any]]
    patterns: Mapping[str, str] = {}
    lists: Mapping[str, Callable[[Module], bool]] = {}
    fixed: Mapping[str, Any] = {}
    free: frozenset[str] = frozenset()
    dropout: str = ""
    conv1d: bool = True
    common: Common | None = None

    @property
    def cls(self) -> Any:
        """Our class."""
        return adapters.get(self.adapter)


def near_whole(value: float) -> float:
    """The integer that a product of scale and rank equals up to rounding, if any."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value


def require_module(form: Form, module: str, base: Base) -> None:
    """Raises ValueError for a module to which PEFT does not apply this form."""
    entry = base.modules[module].entry
    what = "an embedding" if base.is_embedding(module) else "a transformers Conv1D"
    if base.is_embedding(module) or not (form.conv1d or entry.transposed):
        raise ValueError(
            f"{module!r} is {what}, for which PEFT has no {form.peft_type}; leave it "
            "out, or merge it (lorax.merge) and save the model"
        )
