"""The fields of PEFT's `adapter_config.json`, none of which is silently ignored.

Every field is implemented here, or does not affect the function that the adapter
computes, or must have its default; an unknown field is an error.

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

from lorax import adapters, untrusted
from lorax.interop import peft_forms, peft_table
from lorax.interop.factors import Module
from lorax.interop.peft_base import Base
from lorax.interop.peft_forms import Arrays, Common, Form, Place, Shapes
from lorax.interop.peft_selection import (
    ALWAYS_HARMLESS,
    COMMON,
    PREFIX,
    ROWS_TYPE,
    TEXTS,
    Fields,
    Selection,
    first,
)

IMPLEMENTED = frozenset(
    """
    alpha_pattern bias ensure_weight_tying exclude_modules init_lora_weights init_r
    layer_replication layers_pattern layers_to_transform lora_alpha lora_bias
    lora_dropout modules_to_save peft_type r rank_pattern target_modules
    target_parameters trainable_token_indices use_dora use_rslora
    """.split()
)
"""Fields that affect the function; `r` is for LoRA, `init_r` for AdaLoRA."""

HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path beta1 beta2 corda_config deltaT eva_config
    fan_in_fan_out inference_mode loftq_config lora_ga_config megatron_core
    orth_reg_weight peft_version qalora_group_size revision runtime_config target_r
    task_type tfinal tinit total_step velora_config
    """.split()
)
"""Bookkeeping, and fields that only concern training or an init.

PEFT sets `fan_in_fan_out` from the module's class, whatever the file says; VeLoRA only
changes the backward pass; `qalora_group_size` needs `use_qalora`.
"""

DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "megatron_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
}
"""Fields that change the function in ways that are not implemented, with defaults."""

MERGED = "merge it in PEFT (merge_and_unload) and load that model"
INSTEAD = {
    "alora_invocation_tokens": "the adapter acts only after these tokens",
    "arrow_config": "load each adapter by itself, and use lorax.compose.route",
    "kasa_config": MERGED,
    "megatron_config": "the base is Megatron's; save the adapter for transformers",
    "monteclora_config": MERGED,
    "use_bdlora": MERGED,
    "use_qalora": MERGED,
}
"""What to do about them."""

LORA = {"a": ".lora_A.weight", "b": ".lora_B.weight"}
EMBEDDING = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
ADALORA = {"p": ".lora_A", "q": ".lora_B", "lam": ".lora_E"}
B_BIAS = ".lora_B.bias"
MAGNITUDE = {"magnitude": ".lora_magnitude_vector"}


def suffixes(kind: str, embedding: bool) -> dict[str, str]:
    """Returns the suffixes of a module's name, by our fields.

    Args:
      kind: "lora", "dora" or "adalora".
      embedding: whether the module is an embedding.
    """
    if kind == "adalora":
        return ADALORA
    return (EMBEDDING if embedding else LORA) | (MAGNITUDE if kind == "dora" else {})


OLDER = ("LORA", "ADALORA")
"""Types with their own rules, here; the others have an entry in `peft_table`."""

BIASES = ("none", "all", "lora_only")
ROWS = untrusted.listed(untrusted.whole())
TOKENS = ROWS | untrusted.TABLE
RANGES = untrusted.listed(ROWS)
STILL = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
MOVING = re.compile("pissa(_niter_\\d+)?|olora|corda|lora_ga|loftq")
RANKNUM = 1e-5  # PEFT adds it to AdaLoRA's initial rank before dividing by that
RANK, REAL = untrusted.whole(1), untrusted.number()
POSITIVE = untrusted.number(above=0)
MASK = untrusted.listed(untrusted.FLAG)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Selection):
    """The fields of a LoRA, DoRA or AdaLoRA config that affect the function.

    `read` makes it from a config.

    Attributes:
      kind: "lora", "dora" or "adalora".
      rank: default rank; for AdaLoRA the initial one.
      alpha: default numerator of the scale.
      rank_stabilized: whether the scale is alpha / sqrt(rank).
      ranks: rank by pattern; for AdaLoRA a mask of the ranks that are left, by module.
      alphas: alpha by pattern.
    """

    kind: str
    rank: int
    alpha: float
    rank_stabilized: bool
    ranks: Mapping[str, Any]
    alphas: Mapping[str, float]
    common: None = None

    @property
    def suffixes(self) -> set[str]:
        """All possible suffixes of a module's name in the names of its tensors."""
        own = {end for e in (0, 1) for end in suffixes(self.kind, bool(e)).values()}
        return own | ({B_BIAS} if self.lora_bias else set())

    @property
    def said(self) -> str:
        """The form's name in an error."""
        return f"{self.kind} form (peft_type, use_dora)"

    def asks(self, module: str) -> str:
        """Returns what a module's shapes follow from, for an error."""
        return f"rank {self.given(module)['rank']} (by r and rank_pattern, or init_r)"

    def given(self, module: str) -> dict[str, Any]:
        """Returns the rank and scale of one module."""
        weight = f"{module}.weight"
        name = weight if self.adapts(weight) else module  # the name in patterns
        return {"rank": self.kept(name), "scale": self.scale(name)}

    def require(self, module: str, base: Base) -> None:
        """Raises ValueError for a parameter that PEFT would read transposed."""
        plain = base.modules[module].entry.transposed and module != base.head
        if self.adapts(f"{module}.weight") and not plain:
            raise ValueError(
                f"target_parameters names {module + '.weight'!r}, of an embedding or a "
                "Conv1D, which PEFT would read as a matrix [out, in]; name the module "
                "in target_modules instead"
            )

    def shapes(self, place: Place) -> Shapes:
        """Returns the shapes of a module's tensors, by suffix."""
        rank, in_, out = place.given["rank"], place.in_, place.out
        sizes = {"a": (rank, in_), "b": (out, rank), "magnitude": (out,)}
        sizes |= {"p": (rank, in_), "q": (out, rank), "lam": (rank, 1)}
        own = suffixes(self.kind, place.embedding)
        found = {end: sizes[field] for field, end in own.items()}
        return found | ({B_BIAS: (out,)} if self.lora_bias else {})

    def module(self, tensors: Arrays, place: Place) -> Module:
        """Converts a module's tensors to our fields."""
        fields = {
            field: tensors[end][:, 0] if field == "lam" else tensors[end].T
            for field, end in suffixes(self.kind, place.embedding).items()
        }
        scale = {"scale": place.given["scale"]}
        return Module(place.name, adapters.get(self.kind), fields, scale)

    def kept(self, module: str) -> int:
        """Returns the rank of the module's factors on disk."""
        if self.kind != "adalora":
            return self.ranks.get(first(self.ranks, module), self.rank)
        return sum(self.ranks[module]) if module in self.ranks else self.rank

    def scale(self, module: str) -> float:
        """Returns the scale of the product of the module's factors."""
        if self.kind == "adalora":  # it ignores alpha_pattern and rsLoRA
            return self.alpha / (self.rank + RANKNUM)
        alpha = self.alphas.get(first(self.alphas, module), self.alpha)
        rank = self.kept(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormSettings(Selection):
    """The fields of any other type's config that affect the function; see `read`.

    Attributes:
      form: the type's table entry.
      values: of `form.fields`.
      patterned: values by pattern, for each field that has patterns.
    """

    form: Form
    values: Mapping[str, Any]
    patterned: Mapping[str, Mapping[str, Any]]

    @property
    def common(self) -> Common | None:
        """The tensors that all modules share."""
        return self.form.common

    @property
    def suffixes(self) -> set[str]:
        """All possible suffixes of a module's name in the names of its tensors."""
        return set(self.form.tensors)

    @property
    def said(self) -> str:
        """The form's name in an error."""
        return f"{self.form.peft_type} form"

    def asks(self, module: str) -> str:
        """Returns what a module's shapes follow from, for an error."""
        given = self.given(module)
        return ", ".join(f"{name}={value!r}" for name, value in given.items())

    def require(self, module: str, base: Base) -> None:
        """Raises ValueError for a module to which PEFT does not apply this form."""
        peft_forms.require_module(self.form, module, base)

    def shapes(self, place: Place) -> Shapes:
        """Returns the shapes of a module's tensors, by suffix."""
        return self.form.shapes(place)

    def module(self, tensors: Arrays, place: Place) -> Module:
        """Converts a module's tensors to our fields."""
        return Module(place.name, self.form.cls, *self.form.load(tensors, place))

    def given(self, module: str) -> dict[str, Any]:
        """Returns the values of `form.fields` for one module."""
        found = dict(self.values)
        for name, own in self.patterned.items():
            found[name] = own.get(first(own, module), found[name])
        return found


def read(raw: Mapping[str, Any]) -> Settings | FormSettings:
    """Returns the settings of a config as read from JSON.

    Raises:
      ValueError: a field is unknown, not implemented, or out of range.
    """
    fields = _Older(raw)
    kinds = *OLDER, ROWS_TYPE, *(form.peft_type for form in peft_table.FORMS.values())
    kind = fields.one_of("peft_type", kinds)
    if form := peft_table.of_type(kind):
        return _of_form(fields, form)
    if kind == ROWS_TYPE:
        return _of_rows(fields)
    fields.require_known(IMPLEMENTED | HARMLESS, DEFAULTS, INSTEAD)
    dora = fields.take("use_dora", untrusted.FLAG, False)
    if dora and kind == "ADALORA":
        raise fields.error("use_dora", "has no meaning for AdaLoRA")
    lora = kind == "LORA"
    ranks = fields.table("rank_pattern", RANK) if lora else fields.masks()
    return Settings(
        kind="dora" if dora else kind.lower(),
        rank=fields.take("r", RANK, 8) if lora else fields.take("init_r", RANK, 12),
        alpha=float(fields.take("lora_alpha", REAL if lora else POSITIVE, 8)),
        rank_stabilized=fields.take("use_rslora", untrusted.FLAG, False) and lora,
        ranks=ranks,
        alphas=fields.table("alpha_pattern", REAL),
        moved=fields.init(),
        bias=fields.one_of("bias", BIASES) if raw.get("bias") else "none",
        tokens=fields.tokens(),
        lora_bias=fields.lora_bias(lora and not dora),
        replicated=fields.replicated(),
        parameters=fields.parameters(lora and not dora),
        **fields.selection("lora_dropout"),
    )


def _of_form(fields: Fields, form: Form) -> FormSettings:
    """The settings for a type that has an entry in the table."""
    known = COMMON | ALWAYS_HARMLESS | form.free | {form.dropout} | set(form.patterns)
    fields.require_known(known | set(form.fields), form.fixed)
    patterned = {
        of: fields.table(name, form.fields[of][0]) for name, of in form.patterns.items()
    }
    values = {name: fields.take(name, *form.fields[name]) for name in form.fields}
    return FormSettings(
        form=form,
        values=values,
        patterned=patterned,
        **fields.selection(form.dropout),
    )


def _of_rows(fields: _Older) -> Settings:
    """The settings for PEFT's type that only trains rows of embeddings."""
    fields.require_known(
        ALWAYS_HARMLESS | {"peft_type", "target_modules", "token_indices"}, {}
    )
    modules = fields.names("target_modules")
    if isinstance(modules, str) and re.fullmatch(r"[\w.]+", modules):
        modules = (modules,)  # PEFT writes a single name like this
    if isinstance(modules, str):
        raise fields.error("target_modules", "is a pattern; give a list of names")
    rows = fields.rows("token_indices", fields.take("token_indices", ROWS, ()))
    return Settings(
        kind="lora",
        rank=1,
        alpha=1.0,
        rank_stabilized=False,
        ranks={},
        alphas={},
        tokens=dict.fromkeys(modules or ("",), rows),
        **{**fields.selection(""), "targets": ()},
    )


class _Older(Fields):
    """Reads the fields specific to LoRA and AdaLoRA."""

    def masks(self) -> dict[str, list[bool]]:
        """Returns AdaLoRA's rank_pattern, by module."""
        found, rank = {}, self.take("init_r", RANK, 12)
        for key, mask in self.take("rank_pattern", untrusted.TABLE, {}).items():
            untrusted.check(f"rank_pattern.{key}", mask, MASK)
            if len(mask) != rank:
                raise ValueError(
                    f"rank_pattern: {key!r} has {len(mask)} entries, but init_r={rank}"
                )
            module = key.removeprefix(PREFIX).removesuffix(".default")
            found[module.removesuffix(".lora_E")] = mask
        return found

    def tokens(self) -> dict[str, tuple[int, ...]]:
        """Returns the trained rows of embeddings, by module; "" is the input's."""
        name = "trainable_token_indices"
        given = self.take(name, TOKENS, {})
        table = given if isinstance(given, dict) else {"": given}
        return {key: self.rows(name, rows) for key, rows in table.items() if rows}

    def rows(self, name: str, given: Any) -> tuple[int, ...]:
        """Returns the numbers of tokens, which must be distinct."""
        rows = tuple(untrusted.check(name, given, ROWS))
        if len(set(rows)) < len(rows):
            raise self.error(name, "names a token twice")
        return rows

    def lora_bias(self, has: bool) -> bool:
        """Returns whether B has a bias, which PEFT supports only for plain LoRA."""
        given = self.take("lora_bias", untrusted.FLAG, False)
        if given and not has:
            raise self.error("lora_bias", "needs plain LoRA, here and in PEFT")
        return given

    def parameters(self, has: bool) -> tuple[str, ...]:
        """Returns the ends of names of parameters, which PEFT adapts by plain LoRA."""
        given = tuple(self.take("target_parameters", TEXTS, ()))
        if given and (not has or self.raw.get("lora_bias")):
            raise self.error("target_parameters", "needs plain LoRA without lora_bias")
        return given

    def replicated(self) -> tuple[tuple[int, int], ...]:
        """Returns the ranges of layers that make up the model."""
        given = self.take("layer_replication", RANGES, [])
        if any(len(pair) != 2 or pair[0] >= pair[1] for pair in given):
            raise self.error("layer_replication", "is not a list of pairs [from, to)")
        return tuple((start, end) for start, end in given)

    def init(self) -> str:
        value = self.raw.get("init_lora_weights", True)
        value = value.lower() if isinstance(value, str) else value
        if isinstance(value, str) and MOVING.fullmatch(value):
            return value
        if value not in STILL:
            raise self.error(
                "init_lora_weights",
                "is unknown: it may have changed the base's kernels",
            )
        return ""
