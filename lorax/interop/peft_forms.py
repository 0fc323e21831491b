"""How PEFT writes a parametrisation: one entry of a table for each.

An entry says what the type is called, which fields of `adapter_config.json` decide what
the adapter computes, what the tensors of a module are called and how large they are,
and how they become the fields of ours, and back. Reading, checking, stacking, naming
and writing are the same for all: see `peft_tensors` and `peft_written`.

LoRA, DoRA and AdaLoRA are older than the table, know embeddings and tied heads, and
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
      name: of the module.
      in_: how many features it reads.
      out: how many it writes.
      given: the values of `Form.fields`, of patterns those that are this module's.
      kernel: returns the frozen kernel `[in, out]`, float32; None: it is not known.
      embedding: the module is a lookup table; of the table's types none adapts it.
      bias: the module adds one.
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
      names: behind "base_model.", such as "vera_A".
      shapes: their shapes for the modules of a file.
      load: makes of them the arrays of `Base.frozen`, by name.
      save: makes them of the frozen arrays by name, for modules that lie in a base.
      repeated: True where PEFT's files hold them once more for every module.
    """

    names: tuple[str, ...]
    shapes: Callable[[Sequence[Place]], Shapes]
    load: Callable[[Arrays], dict[str, np.ndarray]]
    save: Callable[[Sequence[Module], Sequence[Place], Arrays], dict[str, np.ndarray]]
    repeated: bool = False


class Form(NamedTuple):
    """How PEFT writes one parametrisation.

    Attributes:
      adapter: our registered name.
      peft_type: PEFT's.
      fields: of the config, those that decide the function: their rule and the default
        that PEFT has.
      tensors: all that may follow a module's name in those of its tensors, such as
        ".vera_lambda_b" or ".oft_R.weight".
      shapes: those that a module has, and their shapes.
      load: makes of these tensors, float32, the fields of ours, one axis for every word
        of `Field.dims` but "batch" (in and out flattened), and static fields.
      save: makes the tensors of a module of ours.
      config: the values of `fields` that go with a module of ours; where modules differ
        in one, its pattern says so, or else the adapters cannot be written.
      patterns: config fields that give modules values of their own, and of which field:
        `{"rank_pattern": "r"}`.
      lists: of `fields`, those that name the modules of a kind, and the kind: such as
        IA3's "feedforward_modules". They are no part of `config`.
      fixed: config fields that must have one value: another is not implemented. Most
        types have `{"bias": "none"}`.
      free: config fields that say nothing of the function. Most types have
        "fan_in_fan_out", which PEFT sets itself.
      dropout: the config field of the rate on the branch's input; "": there is none.
      conv1d: True where PEFT adapts transformers' `Conv1D` (GPT-2) too.
      common: the tensors that all modules share; None: there are none.
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
    """The integer that a product of scale and rank was rounded off from, if any."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value


def require_module(form: Form, module: str, base: Base) -> None:
    """Raises ValueError for a module that PEFT does not adapt so."""
    entry = base.modules[module].entry
    what = "an embedding" if base.is_embedding(module) else "a transformers Conv1D"
    if base.is_embedding(module) or not (form.conv1d or entry.transposed):
        raise ValueError(
            f"{module!r} is {what}, on which PEFT has no {form.peft_type}; leave it "
            "out, or merge it (lorax.merge) and save the model"
        )
