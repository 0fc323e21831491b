"""The sound directories of the fuzz, and what changes to them may legally mean."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lorax import checkpoint
from lorax.adapters import AdaLora, Dora, Full, Lora, SlicedLora
from lorax.checkpoint import RunCheckpoints, record
from lorax.interop import loralib, peft
from lorax.models import gpt2, llama
from lorax.types import Axes
from tests.checkpoint import states
from tests.damaged import Case, Source, keys_of
from tests.damaged_configs import CONFIGS, LARGEST, SIZES, config_source

# PEFT and loralib

BASE = llama.Config(31, **SIZES, hidden=24)
PEFT = {
    "alpha_pattern": {"0.self_attn.v_proj": 4},
    "auto_mapping": None,
    "base_model_name_or_path": "org/base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 4,
    "lora_bias": False,
    "lora_dropout": 0.25,
    "megatron_core": "megatron.core",
    "modules_to_save": ["model.norm"],
    "peft_type": "LORA",
    "peft_version": "0.19.1",
    "qalora_group_size": 16,
    "r": 2,
    "rank_pattern": {"0.self_attn.v_proj": 2},
    "revision": None,
    "target_modules": ["v_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "use_something_new": None,
}
ADALORA = {
    "peft_type": "ADALORA",
    "init_r": 2,
    "target_r": 1,
    "total_step": 9,
    "tinit": 0,
    "tfinal": 0,
    "deltaT": 1,
    "beta1": 0.85,
    "orth_reg_weight": 0.5,
    "lora_alpha": 4,
    "lora_dropout": 0.25,
    "target_modules": ["v_proj"],
    "rank_pattern": {"model.layers.0.self_attn.v_proj.lora_E": [True, True]},
}
V = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}"


def peft_folder(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """An adapter on v of both layers."""
    draw = np.random.default_rng(1).standard_normal
    tensors, end = {}, ".weight" if kind == "LORA" else ""
    for layer in range(2):
        tensors[V.format(layer, "A") + end] = draw((2, 16)).astype(np.float32)
        tensors[V.format(layer, "B") + end] = draw((12, 2)).astype(np.float32)
        if kind == "ADALORA":
            tensors[V.format(layer, "E")] = draw((2, 1)).astype(np.float32)
    if kind == "LORA":
        tensors["base_model.model.model.norm.weight"] = draw(16).astype(np.float32)
    folder.mkdir(parents=True)
    told = {"LORA": PEFT, "ADALORA": ADALORA}[kind]
    (folder / "adapter_config.json").write_text(json.dumps(told))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def peft_source(folder: pathlib.Path, kind: str, file: str) -> Source:
    """PEFT's directory, in which one of the two files is changed."""
    load = functools.partial(peft.load, config=BASE)
    sound = peft.load(peft_folder(folder, kind), BASE)
    legal = functools.partial(_peft_means, sound)
    return Source(folder, file, lambda folder: load(folder), legal)


def _peft_means(sound: Any, case: Case) -> Any:
    """The scale, alpha / r, and the dropout; layer 0 has its own alpha."""
    field, value = case.key[-1], case.value
    absent = case.kind in ("null", "missing")
    if case.key[0].startswith("base_model"):
        return None
    (path, lora), *rest = sorted(sound.items())
    if field == "lora_dropout" and absent:
        lora = lora.replace(dropout=0.0)
    elif isinstance(lora, AdaLora):
        alpha = 8 if absent else value
        if field != "lora_alpha" or not isinstance(alpha, int) or alpha > LARGEST:
            return None
        lora = lora.replace(scale=alpha / (2 + 1e-5))
    elif field == "use_rslora" and value is True:
        lora = lora.replace(scale=4 / math.sqrt(2))
    elif field in ("lora_alpha", "alpha_pattern") or case.key[0] == "alpha_pattern":
        first, second = 4.0, 4.0
        if field == "lora_alpha":
            second = 8 if absent else value
        elif len(case.key) == 2 and not absent:
            first = value
        if not all(isinstance(v, int | float) for v in (first, second)):
            return None
        if max(abs(first), abs(second)) > LARGEST:
            return None
        b = np.asarray(lora.b, np.float64)
        b[1] *= (second / 2) / (first / 2)
        lora = lora.replace(scale=first / 2, b=jnp.asarray(b, jnp.float32))
    else:
        return None
    return dict([(path, lora), *rest])


GPT2 = gpt2.Config(31, 16, 8, 2, 2, 32)


def loralib_source(folder: pathlib.Path) -> Source:
    """loralib's file: q and v of the fused kernel, and a norm's bias whole."""
    draw = np.random.default_rng(2).standard_normal
    tensors = {}
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.c_attn.lora_"
        tensors[name + "A"] = draw((4, 8)).astype(np.float32)
        tensors[name + "B"] = draw((16, 2)).astype(np.float32)
    tensors["transformer.ln_f.bias"] = draw(8).astype(np.float32)
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, folder / "loralib.safetensors")
    load = functools.partial(
        loralib.load, config=GPT2, alpha=4.0, merged=(True, False, True)
    )
    sound = load(folder / "loralib.safetensors")

    def legal(case: Case) -> Any:
        if case.kind != "missing" or "ln_f" not in case.key[0]:
            return None
        return {path: a for path, a in sound.items() if "norm_out" not in path}

    return Source(
        folder,
        "loralib.safetensors",
        lambda folder: load(folder / "loralib.safetensors"),
        legal,
    )


# lorax's own


def adapters() -> dict[str, Any]:
    """One adapter of every class, with square kernels among them."""
    draw = lambda *shape: jnp.asarray(
        np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32
    )
    flat, deep = Axes((0,), (1,)), Axes((1,), (2,), (0,))
    sliced = Axes((0,), (1, 2))
    return {
        "square": Lora(draw(4, 2), draw(2, 4), 2.5, flat, 0.25),
        "stack": Dora(draw(2, 3, 1), draw(2, 1, 3), draw(2, 3), 1.5, deep, 0.0, (0, 2)),
        "svd": AdaLora(draw(4, 2), draw(2), draw(2, 4), 0.5, flat),
        "fused": SlicedLora(draw(2, 4, 1), draw(2, 1, 5), 1.0, sliced, (0, 2), 3),
        "bias": Full(draw(3)),
    }


def params() -> dict[str, Any]:
    """Their base."""
    shapes = {"square": (4, 4), "stack": (3, 3, 3), "svd": (4, 4), "fused": (4, 3, 5)}
    draw = np.random.default_rng(3).standard_normal
    shapes["bias"] = (3,)
    return {path: jnp.asarray(draw(s), jnp.float32) for path, s in shapes.items()}


def adapters_source(folder: pathlib.Path, sealed: bool) -> Source:
    """`adapters.json`, with digests or, like older files, without."""
    checkpoint.save_adapters(folder, adapters(), params())
    file = folder / "adapters.json"
    if not sealed:
        told = json.loads(file.read_text())
        del told["digests"]
        for entry in told["adapters"].values():
            for kind in entry["arrays"].values():
                del kind["content"]
        file.write_text(json.dumps(told))
    load = functools.partial(checkpoint.load_adapters, params=params())
    legal = (lambda case: None) if sealed else _adapter_means
    keys = list(keys_of(json.loads(file.read_text())))
    if sealed:  # two adapters stand for all
        keys = [key for key in keys if key[1:2] not in (("svd",), ("fused",))]
    return Source(folder, "adapters.json", lambda folder: load(folder), legal, keys)


def _adapter_means(case: Case) -> Any:
    """A finite scale, a rate below 1, a switch and a name are taken literally."""
    found = adapters()
    if len(case.key) != 4 or case.key[2] != "static":
        return None
    path, field, value = case.key[1], case.key[3], case.value
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if case.kind == "missing" and field in ("dropout", "detach_norm"):
        value = {"dropout": 0.0, "detach_norm": True}[field]
    elif field == "scale" and not (plain and abs(value) < 3.4e38):
        return None
    elif field == "detach_norm" and not isinstance(value, bool):
        return None
    elif field == "moved_by" and not (isinstance(value, str) and value):
        return None
    elif field not in ("scale", "detach_norm", "moved_by"):
        return None
    found[path] = found[path].replace(**{field: value})
    return found


CONFIG = {"run": {"seed": 3}, "rate": 0.1}


def run_source(folder: pathlib.Path, sealed: bool) -> Source:
    """The record of a run's step; resealed, so that only validation can tell."""
    state = states.filled(7, 6)
    with RunCheckpoints(folder, states.base(), source="base", config=CONFIG) as run:
        run.save(state, {"position": 1, "order": [2, 3]}, {"loss": 0.5, "best": 1.0})

    def load(folder: Any) -> Any:
        with RunCheckpoints(folder, states.base()) as run:
            return run.restore(states.fresh())

    def reseal(told: Any) -> None:
        told |= record.seal(told["payload"])

    def legal(case: Case) -> Any:
        """The user's own data may be anything."""
        if case.key[:1] != ("payload",) or len(case.key) < 2 or sealed:
            return None
        if case.key[1] not in ("data", "config", "metrics"):
            return None
        told = load(folder)._asdict()
        place: Any = told
        for key in case.key[1:-1]:
            place = place[key]
        if case.kind == "missing":
            if len(case.key) == 2:
                return None
            del place[case.key[-1]]
        else:
            place[case.key[-1]] = case.value
        return type(load(folder))(**told)

    file = "6/run/metadata"
    told = json.loads((folder / file).read_text())
    keys = [  # two leaves stand for all
        key
        for key in keys_of(told)
        if key[1:2] != ("leaves",) or {"adapters/dense/kernel/a", "key"} & {*key[2:]}
    ]
    if sealed:
        return Source(folder, file, load, legal, keys)
    keys = [key for key in keys if len(key) > 1]
    return Source(folder, file, load, legal, keys, reseal)


def every(folder: pathlib.Path) -> dict[str, Source]:
    """All sources, by name."""
    made = {
        f"config.json of {family}": config_source(family, folder / family)
        for family in CONFIGS
    }
    for kind in ("LORA", "ADALORA"):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            own = folder / f"peft {kind} {file}"
            made[f"PEFT's {file}, {kind}"] = peft_source(own, kind, file)
    made["loralib's safetensors"] = loralib_source(folder / "loralib")
    made["adapters.json"] = adapters_source(folder / "sealed", True)
    made["adapters.json without digests"] = adapters_source(folder / "older", False)
    made["a run's step"] = run_source(folder / "run", True)
    made["a run's step, resealed"] = run_source(folder / "resealed", False)
    return made
