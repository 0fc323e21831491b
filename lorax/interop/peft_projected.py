"""PEFT's forms of VeRA and RandLoRA, in which all modules share random tensors.

base_model.vera_A                              [r, widest in]
base_model.vera_B                              [widest out, r]
base_model.model.<module>.vera_lambda_d        [r]
base_model.model.<module>.vera_lambda_b        [out]
base_model.randlora_A                          [r, 1, narrowest side]
base_model.randlora_B                          [widest side, bases, r]
base_model.model.<module>.randlora_lambda      [r, bases]
base_model.model.<module>.randlora_gamma       [bases, min(in, out)]

PEFT slices the shared tensors for each module, and so do the classes here.

References:
  Mangrulkar et al., PEFT, https://github.com/huggingface/peft: `tuners/vera`,
  `tuners/randlora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorax import untrusted
from lorax.adapters import randlora, vera
from lorax.interop.factors import Module
from lorax.interop.peft_forms import Arrays, Common, Form, Place, Shapes, near_whole

RANK, REAL = untrusted.whole(1), untrusted.number()
Loaded = tuple[dict[str, np.ndarray], dict[str, Any]]
FREE = frozenset({"fan_in_fan_out", "projection_prng_key"})
"""The PRNG key is for projections that are not in the file; here they must be in it."""


def _widest(places: Sequence[Place]) -> tuple[int, int]:
    return max(place.in_ for place in places), max(place.out for place in places)


def _one_pair(arrays: Arrays, names: Sequence[str]) -> list[np.ndarray]:
    """The two frozen arrays of the only rank; ValueError if there are several ranks."""
    ranks = {name.split("/")[1] for name in arrays}
    if len(ranks) > 1:
        raise ValueError(
            f"PEFT has one pair of random matrices, but the adapters have ranks "
            f"{', '.join(sorted(ranks))}; save them separately"
        )
    rank = ranks.pop()
    return [arrays[name.format(rank)] for name in names]


def _vera_shapes(place: Place) -> Shapes:
    return {".vera_lambda_d": (place.given["r"],), ".vera_lambda_b": (place.out,)}


def _vera_load(tensors: Arrays, place: Place) -> Loaded:
    fields = {"d": tensors[".vera_lambda_d"], "b": tensors[".vera_lambda_b"]}
    return fields, {"lent": vera.lent(place.given["r"])}


def _vera_save(module: Module, place: Place) -> dict[str, np.ndarray]:
    del place
    b = np.float32(module.scale) * module.fields["b"]
    return {".vera_lambda_d": module.fields["d"], ".vera_lambda_b": b}


def _vera_common_shapes(places: Sequence[Place]) -> Shapes:
    (n, m), rank = _widest(places), places[0].given["r"]
    return {"vera_A": (rank, n), "vera_B": (m, rank)}


def _vera_common_load(tensors: Arrays) -> dict[str, np.ndarray]:
    reads, writes = (name for _, name in vera.lent(len(tensors["vera_A"])))
    return {reads: tensors["vera_A"].T, writes: tensors["vera_B"].T}


def _vera_common_save(
    modules: Sequence[Module], places: Sequence[Place], arrays: Arrays
) -> dict[str, np.ndarray]:
    """Makes them as PEFT does: just large enough for the written modules."""
    del modules
    reads, writes = _one_pair(arrays, [*vera.NAMES.values()])
    n, m = _widest(places)
    return {"vera_A": reads[:n].T, "vera_B": writes[:, :m].T}


VERA = Form(
    adapter="vera",
    peft_type="VERA",
    fields={"r": (RANK, 256)},
    tensors=(".vera_lambda_d", ".vera_lambda_b"),
    shapes=_vera_shapes,
    load=_vera_load,
    save=_vera_save,
    config=lambda module: {"r": module.rank},
    fixed={"bias": "none", "save_projection": True},
    free=FREE | {"d_initial"},
    dropout="vera_dropout",
    common=Common(
        ("vera_A", "vera_B"), _vera_common_shapes, _vera_common_load, _vera_common_save
    ),
)


def _sides(place: Place) -> tuple[int, int]:
    """The narrower side of a module, and how many bases it has."""
    side = min(place.in_, place.out)
    return side, -(-side // place.given["r"])


def _randlora_shapes(place: Place) -> Shapes:
    side, bases = _sides(place)
    lam = (place.given["r"], bases)
    return {".randlora_lambda": lam, ".randlora_gamma": (bases, side)}


def _randlora_load(tensors: Arrays, place: Place) -> Loaded:
    rank = place.given["r"]
    fields = {"lam": tensors[".randlora_lambda"], "gamma": tensors[".randlora_gamma"]}
    scale = place.given["randlora_alpha"] / rank
    return fields, {"scale": scale, "lent": randlora.lent(rank)}


def _randlora_save(module: Module, place: Place) -> dict[str, np.ndarray]:
    del place
    lam, gamma = module.fields["lam"], module.fields["gamma"]
    return {".randlora_lambda": lam, ".randlora_gamma": gamma}


def _randlora_config(module: Module) -> dict[str, Any]:
    return {"r": module.rank, "randlora_alpha": near_whole(module.scale * module.rank)}


def _randlora_common_shapes(places: Sequence[Place]) -> Shapes:
    sides, rank = sorted(_widest(places)), places[0].given["r"]
    large = (sides[1], -(-sides[0] // rank), rank)
    return {"randlora_A": (rank, 1, sides[0]), "randlora_B": large}


def _randlora_common_load(tensors: Arrays) -> dict[str, np.ndarray]:
    small, large = (name for _, name in randlora.lent(len(tensors["randlora_A"])))
    return {small: tensors["randlora_A"][:, 0], large: tensors["randlora_B"]}


def _randlora_common_save(
    modules: Sequence[Module], places: Sequence[Place], arrays: Arrays
) -> dict[str, np.ndarray]:
    """Makes them as PEFT does: just large enough for the written modules."""
    small, large = _one_pair(arrays, [*randlora.NAMES.values()])
    sides, rank = sorted(_widest(places)), modules[0].rank
    large = large[: sides[1], : -(-sides[0] // rank)]
    return {"randlora_A": small[:, None, : sides[0]], "randlora_B": large}


RANDLORA = Form(
    adapter="randlora",
    peft_type="RANDLORA",
    fields={"r": (RANK, 32), "randlora_alpha": (REAL, 640)},
    tensors=(".randlora_lambda", ".randlora_gamma"),
    shapes=_randlora_shapes,
    load=_randlora_load,
    save=_randlora_save,
    config=_randlora_config,
    fixed={"bias": "none", "save_projection": True},
    free=FREE | {"sparse", "very_sparse", "randlora_dropout"},
    common=Common(
        ("randlora_A", "randlora_B"),
        _randlora_common_shapes,
        _randlora_common_load,
        _randlora_common_save,
        repeated=True,
    ),
)

FORMS = (VERA, RANDLORA)
