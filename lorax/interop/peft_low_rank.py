"""PEFT's forms of LoHa, MiSS and DeLoRA: a few thin matrices for every module.

References:
  Mangrulkar et al., PEFT, https://github.com/huggingface/peft: `tuners/loha`,
  `tuners/miss`, `tuners/delora`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lorax import untrusted
from lorax.interop.factors import Module
from lorax.interop.peft_forms import Arrays, Form, Place, Shapes, near_whole

RANK, REAL = untrusted.whole(1), untrusted.number()
Loaded = tuple[dict[str, np.ndarray], dict[str, Any]]

HADA = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
"""Field of ours -> PEFT's name: its `w1_a @ w1_b` is `[out, in]`."""


def _loha_shapes(place: Place) -> Shapes:
    rank = place.given["r"]
    reads, writes = (rank, place.in_), (place.out, rank)
    return {f".{end}": reads if end[-1] == "b" else writes for end in HADA.values()}


def _loha_load(tensors: Arrays, place: Place) -> Loaded:
    fields = {name: tensors[f".{end}"].T for name, end in HADA.items()}
    return fields, {"scale": place.given["alpha"] / place.given["r"]}


def _loha_save(module: Module, place: Place) -> dict[str, np.ndarray]:
    del place
    return {f".{end}": module.fields[name].T for name, end in HADA.items()}


def _loha_config(module: Module) -> dict[str, Any]:
    return {"r": module.rank, "alpha": near_whole(module.scale * module.rank)}


LOHA = Form(
    adapter="loha",
    peft_type="LOHA",
    fields={"r": (RANK, 8), "alpha": (REAL, 8)},
    tensors=tuple(f".{end}" for end in HADA.values()),
    shapes=_loha_shapes,
    load=_loha_load,
    save=_loha_save,
    config=_loha_config,
    patterns={"rank_pattern": "r", "alpha_pattern": "alpha"},
    free=frozenset({"module_dropout", "rank_dropout", "use_effective_conv2d"}),
    conv1d=False,
)

FORMS = (LOHA,)
