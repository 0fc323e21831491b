"""What the fields of a config may hold: one table, read before any work is done.

A row is a regular expression of a field's dotted name and the rule for its value; the
first row that matches the whole name decides, as everywhere in the house. Fields of a
model's `config.json` have rules of their own in `lorax.models`.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_collections

SKIPPED = r"model\.(random|published)\..*"
"""Fields of a config.json, which the model's family reads and checks."""


class Rule(NamedTuple):
    """What a value has to be.

    Attributes:
      wanted: in words, after "give".
      holds: whether a value is that.
    """

    wanted: str
    holds: Callable[[Any], bool]


def is_whole(value: Any) -> bool:
    """True for an integer, which a bool is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """True for a finite number, which a bool is not."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def whole(low: int, meaning: str = "") -> Rule:
    """A whole number from `low` on."""
    wanted = f"a whole number >= {low}{meaning and f' ({meaning})'}"
    return Rule(wanted, lambda v: is_whole(v) and v >= low)


def number(low: float, high: float = math.inf, *, ends: str = "[]") -> Rule:
    """A number of an interval; `ends` says which of its ends belong to it."""
    below = (lambda v: low <= v) if ends[0] == "[" else (lambda v: low < v)
    above = (lambda v: v <= high) if ends[1] == "]" else (lambda v: v < high)
    wanted = f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}"
    if high == math.inf:
        wanted = f"a finite number {'>=' if ends[0] == '[' else '>'} {low:g}"
    return Rule(wanted, lambda v: is_real(v) and below(v) and above(v))


def one_of(*choices: str) -> Rule:
    """One of some words."""
    return Rule(
        f"one of {', '.join(map(repr, choices))}",
        lambda v: isinstance(v, str) and v in choices,
    )


def each(rule: Rule, example: str, *, least: int = 0) -> Rule:
    """A tuple whose items follow a rule."""
    filled = "a tuple" if not least else f"a tuple of at least {least}"
    return Rule(
        f"{filled}, each {rule.wanted}, such as {example}",
        lambda v: (
            isinstance(v, tuple | list) and len(v) >= least and all(map(rule.holds, v))
        ),
    )


def pairs(example: str) -> Rule:
    """A tuple of pairs with a name in front."""

    def pair(item: Any) -> bool:
        named = isinstance(item, tuple | list) and len(item) == 2
        return named and isinstance(item[0], str)

    return Rule(
        f"pairs (name, value), such as {example}; a dict is written as pairs",
        lambda v: isinstance(v, tuple | list) and all(map(pair, v)),
    )


def optional(rule: Rule, none: Any = None) -> Rule:
    """What a rule allows, or one more value that stands for its absence."""
    return Rule(
        f"{rule.wanted}, or {none!r}",
        lambda v: (v is None if none is None else v == none) or rule.holds(v),
    )


TEXT = Rule("text", lambda v: isinstance(v, str))
NAME = Rule("a name", lambda v: isinstance(v, str) and v != "")
SWITCH = Rule("True or False", lambda v: isinstance(v, bool))
RATE = number(0, 1e3, ends="(]")  # 1,000: far above any that trains, below what is lost
SHARE = number(0, 1)
BELOW_ONE = number(0, 1, ends="[)")
ALL_IF_ZERO = whole(0, "0: all")
PATTERNS = each(NAME, "('all-linear',)")
AXIS = Rule(
    "a whole number >= 1, or -1 for what the others leave",
    lambda v: is_whole(v) and (v >= 1 or v == -1),
)

RULES: tuple[tuple[str, Rule], ...] = (
    # run
    (r"run\.name", NAME),
    (r"run\.seed", whole(0)),
    (r"run\.methods", each(one_of("lora", "full"), "('lora',)", least=1)),
    (r"run\.(steps|log_every|save_keep)", whole(1)),
    (r"run\.label_smoothing", BELOW_ONE),
    (r"run\.skip_nonfinite", whole(0)),
    (r"run\.save_every", whole(0, "0: no checkpoints")),
    (r"run\.save_deadline", number(0, ends="(]")),
    (r"run\.cache_dir", TEXT),
    # distributed
    (r"distributed\.coordinator", TEXT),
    (r"distributed\.processes", optional(whole(1))),
    (r"distributed\.process", optional(whole(0))),
    (r"distributed\.heartbeat", whole(1)),
    # model
    (r"model\.source", TEXT),
    (r"model\.labels", whole(0, "0: no classification head")),
    (r"model\.dtype", one_of("", "float32", "bfloat16", "float16")),
    (r"model\.remat", one_of("none", "full", "dots")),
    (r"model\.attention", one_of("plain", "flash")),
    (r"model\.(vocabulary|layers|width|heads|hidden)", whole(1)),
    # adapter
    (r"adapter\.patterns", PATTERNS),
    (r"adapter\.train_whole", PATTERNS),
    (r"adapter\.(rank|calibration_batches)", whole(1)),
    (r"adapter\.alpha", number(0, ends="(]")),
    (r"adapter\.dropout", BELOW_ONE),
    (r"adapter\.options", pairs("(('gamma', 64.0),)")),
    (r"adapter\.(adapter|scaling|init)", NAME),
    # optimizer, and that of the quickstart's base
    (r"(optimizer|model\.pretrain)\.(adam_)?learning_rate", RATE),
    (r"optimizer\.learning_rate\.(lora|full)", RATE),
    (r"(optimizer|model\.pretrain)\.warmup_steps", whole(0)),
    (r"(optimizer|model\.pretrain)\.final_share", SHARE),
    (r"(optimizer|model\.pretrain)\.b[12]", BELOW_ONE),
    (r"(optimizer|model\.pretrain)\.weight_decay", number(0)),
    (r"(optimizer|model\.pretrain)\.clip_norm", optional(number(0, ends="(]"))),
    (r"(optimizer|model\.pretrain)\.name", NAME),
    (r"model\.pretrain\.(steps|batch_size)", whole(1)),
    (r"optimizer\.options", pairs("(('ratio', 16.0),)")),
    (r"optimizer\.chain", pairs("(('adam', {}), ('lora_plus', 16.0))")),
    (r"optimizer\.wrap", pairs("(('accumulate', 4),)")),
    (r"optimizer\.tuned", TEXT),
    # population
    (r"population\.seed", each(whole(0), "(0, 1)")),
    (r"population\.learning_rate", each(RATE, "(5e-3, 1e-2)")),
    (r"population\.rank", each(whole(1), "(4, 8)")),
    (r"population\.alpha", each(number(0, ends="(]"), "(8.0, 16.0)")),
    # data
    (r"data\.(train_rows|valid_rows)", ALL_IF_ZERO),
    (r"data\.lengths", each(whole(1), "(128, 256)", least=1)),
    (r"data\.(batch_size|length)", whole(1)),
    (r"data\.packed", SWITCH),
    (r"data\.(task|form|template|train|valid|name|root)", TEXT),
    # sharding
    (r"sharding\.(data|fsdp|tensor)", AXIS),
    (r"sharding\.rules", pairs("(('.*/kernel', ('fsdp', 'tensor')),)")),
    (r"sharding\.may_replicate", each(NAME, "('heads',)")),
    (r"sharding\.replicate_adapters", SWITCH),
    (r"sharding\.topology", TEXT),
    # eval
    (r"eval\.every", whole(0, "0: at the end alone")),
    (r"eval\.(rows|final_rows)", ALL_IF_ZERO),
    (r"eval\.test", whole(0, "0: none")),
    (r"eval\.(batch_size|beams|max_tokens|source_bytes|sample_bytes)", whole(1)),
    (r"eval\.no_repeat", whole(0, "0: repeats are allowed")),
    (r"eval\.length_penalty", number(-100, 100)),
    (r"eval\.temperature", number(0)),
    (r"eval\.prompt", NAME),
)
"""The rule of every field that a config of ours has, by its dotted name."""


def rule_of(name: str) -> Rule | None:
    """The rule for a field; None where the table has none."""
    return next((rule for row, rule in RULES if re.fullmatch(row, name)), None)


def leaves(config: ml_collections.ConfigDict) -> Iterable[tuple[str, Any]]:
    """`(dotted name, value)` of every field, sections apart."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from ((f"{name}.{inner}", held) for inner, held in leaves(value))
        else:
            yield name, value


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for the first field whose value its rule does not allow.

    Fields that the table does not know, of a config of somebody's own, pass.
    """
    for name, value in leaves(config):
        rule = None if re.fullmatch(SKIPPED, name) else rule_of(name)
        if rule is not None and not rule.holds(value):
            raise ValueError(f"config.{name}={value!r}: give {rule.wanted}")
