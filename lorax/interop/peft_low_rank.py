"""PEFT's forms of LoHa, MiSS and DeLoRA: a few thin matrices per module.

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
"""Our field -> PEFT's name; PEFT's `w1_a @ w1_b` is `[out, in]`."""


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


def _miss_shapes(place: Place) -> Shapes:
    return {".miss_block": (place.given["r"], place.out)}


def _miss_load(tensors: Arrays, place: Place) -> Loaded:
    if place.given["r"] > place.in_:
        raise ValueError(
            f"r={place.given['r']}, but {place.name!r} has only {place.in_} inputs"
        )
    return {"block": tensors[".miss_block"]}, {}


def _miss_save(module: Module, place: Place) -> dict[str, np.ndarray]:
    del place
    return {".miss_block": np.float32(module.scale) * module.fields["block"]}


def _miss_config(module: Module) -> dict[str, Any]:
    return {"r": module.rank, "init_weights": True}


MISS = Form(
    adapter="miss",
    peft_type="MISS",
    fields={"r": (RANK, 64), "init_weights": (untrusted.FLAG, True)},
    tensors=(".miss_block",),
    shapes=_miss_shapes,
    load=_miss_load,
    save=_miss_save,
    config=_miss_config,
    fixed={"bias": "none"},
    free=frozenset({"mini_r"}),
    dropout="miss_dropout",
    conv1d=False,
)
"""`init_weights` selects its variants, "bat" and "mini", which are refused."""

NORMS = ".delora_w_norm"


def _delora_shapes(place: Place) -> Shapes:
    rank = place.given["r"]
    return {
        ".delora_A": (rank, place.in_),
        ".delora_B": (place.out, rank),
        ".delora_lambda": (1,),
        NORMS: (place.in_,),
    }


def _delora_load(tensors: Arrays, place: Place) -> Loaded:
    if place.kernel is not None:
        own = _norms(place)
        if not np.allclose(tensors[NORMS], own, rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"{place.name + NORMS!r} does not hold the norms of the base's kernel: "
                "the adapter was made for another base"
            )
    a, b = tensors[".delora_A"].T, tensors[".delora_B"].T
    return {"a": a, "b": b, "lam": tensors[".delora_lambda"][0]}, {}


def _delora_save(module: Module, place: Place) -> dict[str, np.ndarray]:
    if place.kernel is None:
        raise ValueError(
            f"{module.name!r}: PEFT stores the norms of DeLoRA's frozen kernels; pass "
            "the base's parameters as params="
        )
    return {
        ".delora_A": module.fields["a"].T,
        ".delora_B": module.fields["b"].T,
        ".delora_lambda": module.fields["lam"].reshape(1),
        NORMS: _norms(place),
    }


def _norms(place: Place) -> np.ndarray:
    assert place.kernel is not None
    return np.sqrt((place.kernel() ** 2).sum(1))


def _delora_config(module: Module) -> dict[str, Any]:
    return {"r": module.rank}


DELORA = Form(
    adapter="delora",
    peft_type="DELORA",
    fields={"r": (RANK, 8)},
    tensors=(".delora_A", ".delora_B", ".delora_lambda", NORMS),
    shapes=_delora_shapes,
    load=_delora_load,
    save=_delora_save,
    config=_delora_config,
    patterns={"rank_pattern": "r"},
    fixed={"bias": "none"},
    free=frozenset({"delora_lambda", "lambda_pattern"}),  # initial values of lam
    dropout="module_dropout",
    conv1d=False,
)

FORMS = (LOHA, MISS, DELORA)
