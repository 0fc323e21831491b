"""The common part of PEFT configs: modules to adapt, modules to save, and dropout.

References:
  Mangrulkar et al., PEFT, https://github.com/huggingface/peft:
  `check_target_module_exists`, `get_pattern_key`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Set
from typing import Any

from lorax import untrusted
from lorax.interop import patterns

COMMON = frozenset(
    """
    exclude_modules layers_pattern layers_to_transform modules_to_save peft_type
    target_modules
    """.split()
)
"""Fields of every type that affect the function."""

ALWAYS_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path inference_mode init_weights peft_version
    revision runtime_config task_type
    """.split()
)
"""Fields of every type that do not affect it."""

PREFIX = "base_model.model."  # of every name in PEFT
ROWS_TYPE = "TRAINABLE_TOKENS"  # the type that only trains rows of embeddings
EVERY_LINEAR = "all-linear"
RATE = untrusted.number(0, below=1)
TEXTS = untrusted.listed(untrusted.TEXT)
NAMES = untrusted.TEXT | TEXTS
LAYERS = untrusted.whole() | untrusted.listed(untrusted.whole())
HEADS = {"SEQ_CLS": ("lm_head", "score", "classifier")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Which modules a config adapts, and which it saves in full.

    Attributes:
      dropout: of the adapter's input.
      targets: a pattern for whole module names, or a list of their last components.
      exclude: likewise; takes precedence over `targets`.
      layers: numbers of the layers to adapt; None for all.
      layers_pattern: patterns for what precedes a layer's number.
      saved: ends of the names of modules that are saved in full.
      tying: whether an embedding's adapter also applies to its tied head.
      heads: modules that "all-linear" leaves out.
      rank: default rank, for inits that change the base.
      moved: name of an init that removed part of the base's kernels, or "".
      bias: which biases are trained and stored: "none", "lora_only" (of the adapted
        modules) or "all".
      tokens: rows of embeddings that are trained, by the end of the module's name; ""
        stands for the input embedding.
      lora_bias: whether B has a bias of its own.
      parameters: ends of the names of parameters with factors that are not modules.
      replicated: ranges of the original model's layers that make up the base; () if the
        layers are not replicated.
    """

    dropout: float
    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    tying: bool
    heads: tuple[str, ...]
    rank: int = 0
    moved: str = ""
    bias: str = "none"
    tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    lora_bias: bool = False
    replicated: tuple[tuple[int, int], ...] = ()
    parameters: tuple[str, ...] = ()

    def selects(self, module: str, linear: bool) -> bool:
        """True when PEFT puts factors on the module.

        Args:
          module: its name in the base model.
          linear: True for a linear map, False for an embedding.
        """
        if self.adapts(f"{module}.weight"):
            return True
        if _matches(self.exclude, module) or self.saves(module):
            return False
        if self.targets == EVERY_LINEAR:
            return linear and module not in self.heads
        if not _matches(self.targets, module):
            return False
        if self.layers is None or module in self.targets:
            return True
        return _layer(module, self.layers_pattern) in self.layers

    def adapts(self, parameter: str) -> bool:
        """True when PEFT puts factors on the parameter itself."""
        return any(
            parameter == name or parameter.endswith(f".{name}")
            for name in self.parameters
        )

    def saves(self, module: str) -> bool:
        """True when PEFT saves the module, or one that contains it, in full."""
        parts = module.split(".")
        whole = [PREFIX + ".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(name.endswith(end) for name in whole for end in self.saved)

    def trains_bias(self, module: str, linear: bool) -> bool:
        """True when the module's bias is trained along with the factors."""
        own = self.bias == "lora_only" and self.selects(module, linear)
        return self.bias == "all" or own


class Fields:
    """Reads the fields of a config and checks each."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Wraps a config as read from JSON."""
        self.raw = raw

    def error(self, name: str, why: str) -> ValueError:
        """Returns an error that names the field and shows its value."""
        return ValueError(f"{name}={untrusted.shown(self.raw.get(name))} {why}")

    def take(self, name: str, rule: untrusted.Rule, default: Any) -> Any:
        """Returns a field's value, checked; null gives the default."""
        given = self.raw.get(name)
        return default if given is None else untrusted.check(name, given, rule)

    def require_known(
        self,
        known: Set[str],
        fixed: Mapping[str, Any],
        instead: Mapping[str, str] = {},
    ) -> None:
        """Refuses unknown fields and values that are not implemented.

        Args:
          known: names.
          fixed: the only value that is implemented, by name.
          instead: what to do about other values, by name.
        """
        for name, default in fixed.items():
            given = self.raw.get(name, default)
            off = untrusted.ZERO.fits(given) and untrusted.ZERO.fits(default)
            if given is not None and not off and given != default:
                told = f"; {instead[name]}" if name in instead else ""
                raise self.error(
                    name, f"is not implemented here, only {default!r}{told}"
                )
        on = {name for name, v in self.raw.items() if not untrusted.ZERO.fits(v)}
        if unknown := sorted(on - known - set(fixed)):
            told = ", ".join(f"{n}={untrusted.shown(self.raw[n])}" for n in unknown)
            raise ValueError(
                f"unknown fields, which may change what the adapter computes: {told}; "
                "remove what you know to be harmless"
            )

    def selection(self, dropout: str) -> dict[str, Any]:
        """Returns the fields of `Selection`, which every type has."""
        targets, layers = self.names("target_modules"), self.layers()
        if isinstance(targets, str) and layers is not None:
            raise self.error("layers_to_transform", "needs a list of target_modules")
        task = self.take("task_type", untrusted.TEXT, "")
        return {
            "dropout": float(self.take(dropout, RATE, 0.0)) if dropout else 0.0,
            "targets": targets,
            "exclude": self.names("exclude_modules"),
            "layers": layers,
            "layers_pattern": _listed(self.names("layers_pattern", patterns_only=True)),
            "saved": tuple(self.take("modules_to_save", TEXTS, ())),
            "tying": self.take("ensure_weight_tying", untrusted.FLAG, False),
            "heads": HEADS.get(task, ("lm_head",)),
        }

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        """Returns a field that must have one of the given values."""
        if self.raw.get(name) not in choices:
            raise self.error(name, f"is not implemented; supported are {choices}")
        return self.raw[name]

    def names(self, name: str, patterns_only: bool = False) -> str | tuple[str, ...]:
        """Returns a pattern for whole names, or the ends of names."""
        value = self.take(name, NAMES, ()) or ()
        every = [value] if isinstance(value, str) else value if patterns_only else []
        for pattern in every:
            self.check(name, pattern)
        if isinstance(value, str):
            return EVERY_LINEAR if value.lower() == EVERY_LINEAR else value
        return tuple(value)

    def check(self, name: str, pattern: str) -> None:
        """Raises ValueError for a pattern that cannot be used."""
        try:
            patterns.compiled(pattern)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def layers(self) -> tuple[int, ...] | None:
        """Returns the numbers of the layers to adapt; None for all."""
        value = self.take("layers_to_transform", LAYERS, [])
        given = [value] if isinstance(value, int) else value
        return tuple(given) or None

    def table(self, name: str, rule: untrusted.Rule) -> dict[str, Any]:
        """Returns a field's values by pattern."""
        value = self.take(name, untrusted.TABLE, {})
        for key, item in value.items():
            untrusted.check(f"{name}.{key}", item, rule)
            self.check(name, key)
        return dict(value)


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return patterns.compiled(names).fullmatch(module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def first(table: Mapping[str, Any], module: str) -> str:
    """Returns the first pattern that matches the end of the name, else the name."""
    found = (key for key in table if patterns.compiled(key).tail(module))
    return next(found, module)


def _layer(module: str, before: tuple[str, ...]) -> int | None:
    """The layer number in a name, found as PEFT does."""
    if not before:
        # at least two components before it and one after
        parts = module.split(".")
        return next((int(p) for p in parts[2:-1] if p.isdecimal()), None)
    starts = [0, *(i + 1 for i, c in enumerate(module) if c == ".")]
    for pattern in before:
        for start in starts:
            for end in sorted(patterns.compiled(pattern).ends(module, start)):
                if found := re.compile(r"\.(\d+)\.").match(module, end):
                    return int(found[1])
    return None
