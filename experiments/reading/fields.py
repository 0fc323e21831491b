"""What the fields of a config may hold: one table, checked before any work is done.

Each row is a regular expression for a field's dotted name and the rule for its value;
the first row that matches the whole name wins, as everywhere in lorax. Fields of a
model's `config.json` have rules of their own in `lorax.models`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import ml_collections

from lorax import sharding
from lorax.models import experts, pooling
from lorax.untrusted import FLAG, TEXT, Rule, check, choice, listed, number, whole

SKIPPED = r"model\.(random|published)\..*"
"""Fields of a config.json, which the model's family reads and checks."""


def such_as(rule: Rule, example: str) -> Rule:
    """Returns the same rule, with an example of a valid value."""
    return Rule(f"{rule.says}, such as {example}", rule.fits)


def pairs(example: str) -> Rule:
    """Returns the rule for a tuple of pairs (name, value)."""

    def fits(item: Any) -> bool:
        named = isinstance(item, tuple | list) and len(item) == 2
        return named and isinstance(item[0], str)

    says = f"pairs (name, value), such as {example}; a dict is written as pairs"
    return Rule(says, listed(Rule("a pair", fits)).fits)


NAME = Rule("a name", lambda v: isinstance(v, str) and v != "")
RATE = number(most=1e3, above=0)  # far above any rate that trains
SHARE = number(0, 1)
BELOW_ONE = number(0, below=1)
POSITIVE = number(above=0)
PATTERNS = such_as(listed(NAME), "('all-linear',)")
CHOSEN = Rule("-1 to choose it from the sizes", lambda v: v == -1)
AXIS = whole(1) | Rule("-1 for what the other axes leave", lambda v: v == -1)

RULES: tuple[tuple[str, Rule], ...] = (
    # run
    (r"run\.name", NAME),
    (r"run\.seed", whole()),
    (r"run\.methods", such_as(listed(choice("lora", "full"), 1), "('lora',)")),
    (r"run\.(steps|log_every|save_keep)", whole(1)),
    (r"run\.label_smoothing", BELOW_ONE),
    (r"run\.loss_chunk", whole() | CHOSEN),
    (r"run\.router_loss", number(0) | Rule("-1 for the model's", lambda v: v == -1)),
    (r"run\.router_z_loss", number(0)),
    (r"run\.loss", TEXT),
    (r"run\.loss_options", pairs("(('beta', 0.1),)")),
    (r"run\.skip_nonfinite", whole()),
    (r"run\.save_every", whole()),
    (r"run\.save_deadline", POSITIVE),
    (r"run\.(cache_dir|wandb)", TEXT),
    (r"run\.plugins", such_as(listed(NAME), "('my_package.methods',)")),
    # distributed
    (r"distributed\.coordinator", TEXT),
    (r"distributed\.processes", whole(1) | None),
    (r"distributed\.process", whole() | None),
    (r"distributed\.heartbeat", whole(1)),
    # model
    (r"model\.(source|teacher)", TEXT),
    (r"model\.quantize", TEXT),
    (r"model\.labels", whole()),
    (r"model\.head", choice("", "none", "classification", "mlm")),
    (r"model\.dtype", choice("", "float32", "bfloat16", "float16")),
    (r"model\.scan", FLAG),
    (r"model\.remat", TEXT),
    (r"model\.dispatch", choice("", *experts.DISPATCHES)),
    (r"model\.attention", choice("plain", "flash", "lean", "splash", "cudnn", "tiles")),
    (r"model\.(vocabulary|layers|width|heads|hidden)", whole(1)),
    # adapter
    (r"adapter\.patterns", PATTERNS),
    (r"adapter\.train_whole", PATTERNS),
    (r"adapter\.(rank|calibration_batches)", whole(1)),
    (r"adapter\.redistribute", number(1, 2)),
    (r"adapter\.alpha", POSITIVE),
    (r"adapter\.dropout", BELOW_ONE),
    (r"adapter\.options", pairs("(('gamma', 64.0),)")),
    (r"adapter\.(adapter|scaling|init)", NAME),
    # optimizer, and the one that pretrains the quickstart's base
    (r"(optimizer|model\.pretrain)\.(adam_)?learning_rate", RATE),
    (r"optimizer\.learning_rate\.(lora|full)", RATE),
    (r"(optimizer|model\.pretrain)\.warmup_steps", whole()),
    (r"(optimizer|model\.pretrain)\.final_share", SHARE),
    (r"(optimizer|model\.pretrain)\.b[12]", BELOW_ONE),
    (r"(optimizer|model\.pretrain)\.weight_decay", number(0)),
    (r"(optimizer|model\.pretrain)\.clip_norm", POSITIVE | None),
    (r"(optimizer|model\.pretrain)\.name", NAME),
    (r"model\.pretrain\.(steps|batch_size)", whole(1)),
    (r"optimizer\.options", pairs("(('ratio', 16.0),)")),
    (r"optimizer\.chain", pairs("(('adam', {}), ('lora_plus', 16.0))")),
    (r"optimizer\.wrap", pairs("(('accumulate', 4),)")),
    (r"optimizer\.rates", pairs("(('classifier_.*', 3e-3),)")),
    (r"optimizer\.tuned", TEXT),
    # population
    (r"population\.seed", such_as(listed(whole()), "(0, 1)")),
    (r"population\.learning_rate", such_as(listed(RATE), "(5e-3, 1e-2)")),
    (r"population\.rank", such_as(listed(whole(1)), "(4, 8)")),
    (r"population\.alpha", such_as(listed(POSITIVE), "(8.0, 16.0)")),
    # data
    (r"data\.(train_rows|valid_rows)", whole()),
    (r"data\.lengths", such_as(listed(whole(1), 1), "(128, 256)")),
    (r"data\.(batch_size|length)", whole(1)),
    (r"data\.packed", FLAG),
    (r"data\.pooling", choice("", *pooling.MODES)),
    (r"data\.scale", POSITIVE),
    (r"data\.classes", such_as(listed(whole()), "(0, 1, 2)")),
    (r"data\.held_out", number(above=0, below=1)),
    (r"data\.split_seed", whole()),
    (r"data\.(task|form|template|train|valid|name|root)", TEXT),
    # sharding
    (r"sharding\.(data|fsdp|expert|context|tensor)", AXIS),
    (r"sharding\.rules", pairs("(('.*/kernel', ('fsdp', 'tensor')),)")),
    (r"sharding\.may_replicate", such_as(listed(NAME), "('heads',)")),
    (r"sharding\.adapters", choice(*sharding.CUTS)),
    (r"sharding\.topology", TEXT),
    # eval
    (r"eval\.every", whole()),
    (r"eval\.(rows|final_rows)", whole()),
    (r"eval\.test", whole()),
    (r"eval\.(batch_size|beams|max_tokens|source_bytes|sample_bytes)", whole(1)),
    (r"eval\.no_repeat", whole()),
    (r"eval\.length_penalty", number(-100, 100)),
    (r"eval\.temperature", number(0)),
    (r"eval\.prompt", NAME),
)
"""The rule for every field of lorax's own configs, by its dotted name."""


def rule_of(name: str) -> Rule | None:
    """Returns the rule for a field, or None if the table has none."""
    return next((rule for row, rule in RULES if re.fullmatch(row, name)), None)


def leaves(config: ml_collections.ConfigDict) -> Iterable[tuple[str, Any]]:
    """Yields `(dotted name, value)` for every field that is not a section."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from ((f"{name}.{inner}", held) for inner, held in leaves(value))
        else:
            yield name, value


def require(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for the first field whose value its rule does not allow.

    Fields that the table does not know, as in a user's own config, pass.
    """
    for name, value in leaves(config):
        rule = None if re.fullmatch(SKIPPED, name) else rule_of(name)
        if rule is not None:
            check(f"config.{name}", value, rule)
