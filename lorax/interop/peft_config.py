"""The fields of PEFT's `adapter_config.json`, so that none is ignored unseen.

Every field is implemented here, or says nothing of the function that the adapter
computes, or must have its default; a field that nobody here has heard of is an error.

References:
  Mangrulkar et al., PEFT, https://github.com/huggingface/peft: `LoraConfig`,
  `AdaLoraConfig`, `check_target_module_exists`, `get_pattern_key`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from lorax import untrusted
from lorax.interop import patterns

IMPLEMENTED = frozenset(
    """
    alpha_pattern ensure_weight_tying exclude_modules init_lora_weights init_r
    layers_pattern layers_to_transform lora_alpha lora_dropout modules_to_save peft_type
    r rank_pattern target_modules use_dora use_rslora
    """.split()
)
"""Fields that decide the function; `r` does so for LoRA, `init_r` for AdaLoRA."""

HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path beta1 beta2 corda_config deltaT eva_config
    fan_in_fan_out inference_mode loftq_config lora_ga_config megatron_core
    orth_reg_weight peft_version qalora_group_size revision runtime_config target_r
    task_type tfinal tinit total_step velora_config
    """.split()
)
"""What is bookkeeping, or speaks of training or of an init only.

PEFT sets `fan_in_fan_out` from the module's class, whatever the file says; VeLoRA is a
backward pass; `qalora_group_size` needs `use_qalora`.
"""

DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "bias": "none",
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "megatron_config": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
}
"""Fields that change the function in a way that is not implemented."""

STILL = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
MOVING = re.compile("pissa(_niter_\\d+)?|olora|corda|lora_ga|loftq")
PREFIX = "base_model.model."  # of every name in PEFT
RANKNUM = 1e-5  # what PEFT adds to AdaLoRA's initial rank before it divides by it
EVERY_LINEAR = "all-linear"
RANK, REAL = untrusted.whole(1), untrusted.number()
POSITIVE, RATE = untrusted.number(above=0), untrusted.number(0, below=1)
TEXTS = untrusted.listed(untrusted.TEXT)
NAMES = untrusted.TEXT | TEXTS
LAYERS = untrusted.whole() | untrusted.listed(untrusted.whole())
MASK = untrusted.listed(untrusted.FLAG)
HEADS = {"SEQ_CLS": ("lm_head", "score", "classifier")}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a config says of the function; see `read`.

    Attributes:
      kind: "lora", "dora" or "adalora".
      rank: default rank; of AdaLoRA the initial one.
      alpha: default numerator of the scale.
      dropout: of the adapter's input.
      rank_stabilized: the scale is alpha / sqrt(rank).
      targets: a pattern of whole module names, or their last components.
      exclude: likewise; wins over `targets`.
      layers: numbers of the layers that are adapted; None for all.
      layers_pattern: patterns of what stands before a layer's number.
      ranks: rank by pattern; of AdaLoRA which initial triplets are left, by module.
      alphas: alpha by pattern.
      saved: ends of names of modules that are stored whole.
      tying: the adapter of an embedding is its tied head's too.
      heads: what "all-linear" leaves out.
      moved: name of an init that took a part out of the base's kernels, or "".
    """

    kind: str
    rank: int
    alpha: float
    dropout: float
    rank_stabilized: bool
    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    ranks: Mapping[str, Any]
    alphas: Mapping[str, float]
    saved: tuple[str, ...]
    tying: bool
    heads: tuple[str, ...]
    moved: str

    def selects(self, module: str, linear: bool) -> bool:
        """True when PEFT puts factors on the module.

        Args:
          module: its name in the base model.
          linear: it is a linear map; else an embedding.
        """
        if _matches(self.exclude, module) or self.saves(module):
            return False
        if self.targets == EVERY_LINEAR:
            return linear and module not in self.heads
        if not _matches(self.targets, module):
            return False
        if self.layers is None or module in self.targets:
            return True
        return _layer(module, self.layers_pattern) in self.layers

    def saves(self, module: str) -> bool:
        """True when PEFT stores the module whole, or one that contains it."""
        parts = module.split(".")
        whole = [PREFIX + ".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(name.endswith(end) for name in whole for end in self.saved)

    def kept(self, module: str) -> int:
        """The rank of the module's factors on disk."""
        if self.kind != "adalora":
            return self.ranks.get(_first(self.ranks, module), self.rank)
        return sum(self.ranks[module]) if module in self.ranks else self.rank

    def scale(self, module: str) -> float:
        """The factor on the product of the module's factors."""
        if self.kind == "adalora":  # alpha_pattern is not for it, nor is rsLoRA
            return self.alpha / (self.rank + RANKNUM)
        alpha = self.alphas.get(_first(self.alphas, module), self.alpha)
        rank = self.kept(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read(raw: Mapping[str, Any]) -> Settings:
    """Returns the settings of a config as read from JSON.

    Raises:
      ValueError: a field that is unknown, not implemented, or out of range.
    """
    fields = _Fields(raw)
    kind = fields.one_of("peft_type", ("LORA", "ADALORA"))
    for name, default in DEFAULTS.items():
        given = raw.get(name, default)
        off = untrusted.ZERO.fits(given) and untrusted.ZERO.fits(default)
        if given is not None and not off and given != default:
            raise fields.error(name, f"is not implemented here, only {default!r}")
    on = {name for name, value in raw.items() if not untrusted.ZERO.fits(value)}
    if unknown := sorted(on - IMPLEMENTED - HARMLESS - set(DEFAULTS)):
        told = ", ".join(f"{name}={untrusted.shown(raw[name])}" for name in unknown)
        raise ValueError(
            f"unknown fields, which may change what the adapter computes: {told}; "
            "remove what you know to be harmless"
        )
    dora = fields.take("use_dora", untrusted.FLAG, False)
    if dora and kind == "ADALORA":
        raise fields.error("use_dora", "has no meaning for AdaLoRA")
    targets = fields.names("target_modules")
    layers = fields.layers()
    if isinstance(targets, str) and layers is not None:
        raise fields.error("layers_to_transform", "needs a list of target_modules")
    lora = kind == "LORA"
    ranks = fields.table("rank_pattern", RANK) if lora else fields.masks()
    return Settings(
        kind="dora" if dora else kind.lower(),
        rank=fields.take("r", RANK, 8) if lora else fields.take("init_r", RANK, 12),
        alpha=float(fields.take("lora_alpha", REAL if lora else POSITIVE, 8)),
        dropout=float(fields.take("lora_dropout", RATE, 0.0)),
        rank_stabilized=fields.take("use_rslora", untrusted.FLAG, False) and lora,
        targets=targets,
        exclude=fields.names("exclude_modules"),
        layers=layers,
        layers_pattern=_listed(fields.names("layers_pattern", patterns_only=True)),
        ranks=ranks,
        alphas=fields.table("alpha_pattern", REAL),
        saved=tuple(fields.take("modules_to_save", TEXTS, ())),
        tying=fields.take("ensure_weight_tying", untrusted.FLAG, False),
        heads=HEADS.get(fields.take("task_type", untrusted.TEXT, ""), ("lm_head",)),
        moved=fields.init(),
    )


class _Fields:
    """Takes fields, each with its checks."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def error(self, name: str, why: str) -> ValueError:
        return ValueError(f"{name}={untrusted.shown(self.raw.get(name))} {why}")

    def take(self, name: str, rule: untrusted.Rule, default: Any) -> Any:
        given = self.raw.get(name)
        return default if given is None else untrusted.check(name, given, rule)

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        if self.raw.get(name) not in choices:
            raise self.error(name, f"is not implemented; known are {choices}")
        return self.raw[name]

    def names(self, name: str, patterns_only: bool = False) -> str | tuple[str, ...]:
        value = self.take(name, NAMES, ()) or ()
        every = [value] if isinstance(value, str) else value if patterns_only else []
        for pattern in every:
            self.check(name, pattern)
        if isinstance(value, str):
            return EVERY_LINEAR if value.lower() == EVERY_LINEAR else value
        return tuple(value)

    def check(self, name: str, pattern: str) -> None:
        try:
            patterns.compiled(pattern)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def layers(self) -> tuple[int, ...] | None:
        value = self.take("layers_to_transform", LAYERS, [])
        given = [value] if isinstance(value, int) else value
        return tuple(given) or None

    def table(self, name: str, rule: untrusted.Rule) -> dict[str, Any]:
        value = self.take(name, untrusted.TABLE, {})
        for key, item in value.items():
            untrusted.check(f"{name}.{key}", item, rule)
            self.check(name, key)
        return dict(value)

    def masks(self) -> dict[str, list[bool]]:
        """AdaLoRA's rank_pattern, by module."""
        found, rank = {}, self.take("init_r", RANK, 12)
        for key, mask in self.take("rank_pattern", untrusted.TABLE, {}).items():
            untrusted.check(f"rank_pattern.{key}", mask, MASK)
            if len(mask) != rank:
                raise ValueError(
                    f"rank_pattern: {key!r} has {len(mask)} entries and init_r={rank}"
                )
            module = key.removeprefix(PREFIX).removesuffix(".default")
            found[module.removesuffix(".lora_E")] = mask
        return found

    def init(self) -> str:
        value = self.raw.get("init_lora_weights", True)
        value = value.lower() if isinstance(value, str) else value
        if isinstance(value, str) and MOVING.fullmatch(value):
            return value
        if value not in STILL:
            raise self.error(
                "init_lora_weights", "is unknown: it may have moved the base's kernels"
            )
        return ""


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return patterns.compiled(names).fullmatch(module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first(table: Mapping[str, Any], module: str) -> str:
    """The first pattern that matches the end of the name; else the name."""
    found = (key for key in table if patterns.compiled(key).tail(module))
    return next(found, module)


def _layer(module: str, before: tuple[str, ...]) -> int | None:
    """The layer's number in a name, as PEFT finds it."""
    if not before:
        # at least two components in front of it and one behind
        parts = module.split(".")
        return next((int(p) for p in parts[2:-1] if p.isdecimal()), None)
    starts = [0, *(i + 1 for i, c in enumerate(module) if c == ".")]
    for pattern in before:
        for start in starts:
            for end in sorted(patterns.compiled(pattern).ends(module, start)):
                if found := re.compile(r"\.(\d+)\.").match(module, end):
                    return int(found[1])
    return None
