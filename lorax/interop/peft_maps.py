"""PEFT's forms of OFT, (IA)^3, LoKr and HRA.

References:
  Mangrulkar et al., PEFT, https://github.com/huggingface/peft: `tuners/oft`,
  `tuners/ia3`, `tuners/lokr`, `tuners/hra`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lorax import untrusted
from lorax.adapters import lokr
from lorax.interop import patterns
from lorax.interop.factors import Module
from lorax.interop.peft_forms import Arrays, Form, Place, Shapes, near_whole
from lorax.interop.peft_selection import NAMES

RANK, REAL, FLAG = untrusted.whole(1), untrusted.number(), untrusted.FLAG
Loaded = tuple[dict[str, np.ndarray], dict[str, Any]]

OFT_R = ".oft_R.weight"
LEAST_TERMS = 4  # PEFT's series with 3 terms equals that with 4; 1 and 2 differ


def _block_size(place: Place) -> int:
    """The nearest divisor of the inputs, by size or number, chosen as in PEFT."""
    count, size = place.given["r"], place.given["oft_block_size"]
    if (count == 0) == (size == 0):
        raise ValueError(
            f"r={count} and oft_block_size={size}: PEFT needs exactly one of them"
        )
    if count == 0:
        return _nearest(place.in_, size)
    return place.in_ // _nearest(place.in_, count)


def _nearest(n: int, near: int) -> int:
    """The divisor of n nearest to a number; ties go to the smaller one."""
    if near >= n:
        return n
    divisors = (d for d in range(1, n + 1) if n % d == 0)
    return min(divisors, key=lambda d: (abs(d - near), d))


def _oft_shapes(place: Place) -> Shapes:
    size = _block_size(place)
    blocks = 1 if place.given["block_share"] else place.in_ // size
    return {OFT_R: (blocks, size * (size - 1) // 2)}


def _oft_load(tensors: Arrays, place: Place) -> Loaded:
    """Loads OFT; PEFT's inverse uses -Q and its series Q."""
    given = place.given
    skew, terms = tensors[OFT_R], given["num_cayley_neumann_terms"]
    if not given["use_cayley_neumann"]:
        skew, terms = -skew, None
    elif terms < LEAST_TERMS - 1:
        raise ValueError(
            f"num_cayley_neumann_terms={terms}: PEFT's sum is then I or I + 2 Q, which "
            "is not implemented here; it must be 3 or more"
        )
    else:
        terms = max(terms, LEAST_TERMS)
    eps = float(given["eps"]) if given["coft"] else None
    return {"skew": skew}, {"cayley_terms": terms, "eps": eps}


def _oft_save(module: Module, place: Place) -> dict[str, np.ndarray]:
    terms, skew = module.statics["cayley_terms"], module.fields["skew"]
    if terms is not None and terms < LEAST_TERMS:
        raise ValueError(
            f"{place.name!r} has cayley_terms={terms}, but PEFT's OFT has no such "
            f"series; it agrees with {LEAST_TERMS} terms or more, and with None"
        )
    return {OFT_R: -skew if terms is None else skew}


def _oft_config(module: Module) -> dict[str, Any]:
    blocks, entries = module.fields["skew"].shape
    terms, eps = module.statics["cayley_terms"], module.statics["eps"]
    return {
        "r": 0,
        "oft_block_size": (1 + math.isqrt(1 + 8 * entries)) // 2,
        "coft": eps is not None,
        "eps": 6e-5 if eps is None else eps,
        "block_share": blocks == 1,
        "use_cayley_neumann": terms is not None,
        "num_cayley_neumann_terms": 5 if terms is None else terms,
    }


OFT = Form(
    adapter="oft",
    peft_type="OFT",
    fields={
        "r": (untrusted.whole(0), 0),
        "oft_block_size": (untrusted.whole(0), 32),
        "coft": (FLAG, False),
        "eps": (REAL, 6e-5),
        "block_share": (FLAG, False),
        "use_cayley_neumann": (FLAG, True),
        "num_cayley_neumann_terms": (RANK, 5),
    },
    tensors=(OFT_R,),
    shapes=_oft_shapes,
    load=_oft_load,
    save=_oft_save,
    config=_oft_config,
    fixed={"bias": "none"},
    free=frozenset({"fan_in_fan_out", "module_dropout"}),
    conv1d=False,
)

IA3_L = ".ia3_l"


def _feedforward(place: Place) -> bool:
    """True if PEFT's gain is on the inputs: `_check_target_module_feedforward`."""
    names = place.given["feedforward_modules"]
    if names is None:
        raise ValueError(
            "feedforward_modules=null: PEFT then uses its own table of models; write "
            "the list out, [] for none"
        )
    if isinstance(names, str):
        return patterns.compiled(names).fullmatch(place.name)
    return place.name.endswith(tuple(names))


def _ia3_shapes(place: Place) -> Shapes:
    return {IA3_L: (1, place.in_) if _feedforward(place) else (place.out, 1)}


def _ia3_load(tensors: Arrays, place: Place) -> Loaded:
    if _feedforward(place):
        return {"input_gain": tensors[IA3_L].ravel()}, {}
    _require_no_bias(place)
    return {"gain": tensors[IA3_L].ravel()}, {}


def _ia3_save(module: Module, place: Place) -> dict[str, np.ndarray]:
    if len(module.fields) > 1:
        raise ValueError(
            f"{place.name!r} has gains on inputs and outputs, but PEFT's IA3 has one"
        )
    if "input_gain" in module.fields:
        return {IA3_L: module.fields["input_gain"][None]}
    _require_no_bias(place)
    return {IA3_L: module.fields["gain"][:, None]}


def _require_no_bias(place: Place) -> None:
    """Refuses output gains on a module with a bias, which PEFT multiplies as well.

    A gain on the kernel and another on the bias, which is a leaf of its own, would
    start equal, but an optimiser would train two numbers where PEFT has one.
    """
    if place.bias:
        raise ValueError(
            f"{place.name!r} has a bias, which PEFT's IA3 multiplies by the same "
            "output gain; here a gain applies to the kernel only, and one on the bias "
            "would train separately. Give the module a gain on inputs "
            "(feedforward_modules), or merge it in PEFT (merge_and_unload) and load "
            "the merged model"
        )


def _ia3_config(module: Module) -> dict[str, Any]:
    del module
    return {}


IA3 = Form(
    adapter="ia3",
    peft_type="IA3",
    fields={"feedforward_modules": (NAMES, None)},
    tensors=(IA3_L,),
    shapes=_ia3_shapes,
    load=_ia3_load,
    save=_ia3_save,
    config=_ia3_config,
    lists={"feedforward_modules": lambda module: "input_gain" in module.fields},
    free=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
)

LOKR_ENDS = {
    "w1": "lokr_w1",
    "w1_a": "lokr_w1_b",
    "w1_b": "lokr_w1_a",
    "w2": "lokr_w2",
    "w2_a": "lokr_w2_b",
    "w2_b": "lokr_w2_a",
}
"""Our field -> PEFT's name; PEFT's w1 is `[p, m]`, and w1_a is on the output side."""


def _lokr_shapes(place: Place) -> Shapes:
    given = place.given
    return _lokr_sizes(
        place, given["r"], given["decompose_factor"], given["decompose_both"]
    )


def _lokr_sizes(place: Place, rank: int, factor: int, both: bool) -> Shapes:
    """The shapes that PEFT gives a module."""
    (m, n), (p, k) = (lokr.split(size, factor) for size in (place.in_, place.out))
    thin = both and rank < max(p, m) / 2, rank < max(k, n) / 2
    found: dict[str, tuple[int, ...]] = {}
    for name, low, reads, writes in zip(
        ("w1", "w2"), thin, (m, n), (p, k), strict=True
    ):
        if low:
            found |= {f".lokr_{name}_a": (writes, rank)}
            found |= {f".lokr_{name}_b": (rank, reads)}
        else:
            found |= {f".lokr_{name}": (writes, reads)}
    return found


def _lokr_load(tensors: Arrays, place: Place) -> Loaded:
    given = place.given
    fields = {n: tensors[f".{e}"].T for n, e in LOKR_ENDS.items() if f".{e}" in tensors}
    return fields, {
        "scale": given["alpha"] / given["r"],
        "factor": given["decompose_factor"],
        "decompose_both": given["decompose_both"],
    }


def _lokr_save(module: Module, place: Place) -> dict[str, np.ndarray]:
    found = {f".{LOKR_ENDS[name]}": array.T for name, array in module.fields.items()}
    statics = module.statics["factor"], module.statics["decompose_both"]
    want = _lokr_sizes(place, _lokr_rank(module), *statics)
    have = {end: array.shape for end, array in found.items()}
    if have != want:
        raise ValueError(
            f"{place.name!r} has {have}, but PEFT's LOKR with decompose_factor="
            f"{statics[0]}, decompose_both={statics[1]} has {dict(want)}"
        )
    return found


def _lokr_rank(module: Module) -> int:
    """PEFT's r; for two full matrices, the least r at which PEFT keeps them full."""
    if module.rank:
        return module.rank
    sides = [*module.fields["w2"].shape]
    if module.statics["decompose_both"]:
        sides += module.fields["w1"].shape
    return max(1, math.ceil(max(sides) / 2))


def _lokr_config(module: Module) -> dict[str, Any]:
    rank = _lokr_rank(module)
    return {
        "r": rank,
        "alpha": near_whole(module.scale * rank),
        "decompose_factor": module.statics["factor"],
        "decompose_both": module.statics["decompose_both"],
    }


LOKR = Form(
    adapter="lokr",
    peft_type="LOKR",
    fields={
        "r": (RANK, 8),
        "alpha": (REAL, 8),
        "decompose_both": (FLAG, False),
        "decompose_factor": (untrusted.whole(-1), -1),
    },
    tensors=tuple(f".{end}" for end in LOKR_ENDS.values()),
    shapes=_lokr_shapes,
    load=_lokr_load,
    save=_lokr_save,
    config=_lokr_config,
    patterns={"rank_pattern": "r", "alpha_pattern": "alpha"},
    free=frozenset(
        "module_dropout rank_dropout rank_dropout_scale use_effective_conv2d".split()
    ),
    conv1d=False,
)

HRA_U = ".hra_u"


def _hra_shapes(place: Place) -> Shapes:
    return {HRA_U: (place.in_, place.given["r"])}


def _hra_load(tensors: Arrays, place: Place) -> Loaded:
    return {"u": tensors[HRA_U]}, {"gram_schmidt": place.given["apply_GS"]}


def _hra_save(module: Module, place: Place) -> dict[str, np.ndarray]:
    u = module.fields["u"]
    if not u.any(axis=0).all():
        raise ValueError(
            f"{place.name!r} has a zero normal vector, which reflects nothing here "
            "and gives NaN in PEFT"
        )
    return {HRA_U: u}


def _hra_config(module: Module) -> dict[str, Any]:
    return {"r": module.rank, "apply_GS": module.statics["gram_schmidt"]}


HRA = Form(
    adapter="hra",
    peft_type="HRA",
    fields={"r": (RANK, 8), "apply_GS": (FLAG, False)},
    tensors=(HRA_U,),
    shapes=_hra_shapes,
    load=_hra_load,
    save=_hra_save,
    config=_hra_config,
    fixed={"bias": "none"},
    conv1d=False,
)

FORMS = (OFT, IA3, LOKR, HRA)
