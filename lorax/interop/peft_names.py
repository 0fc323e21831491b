"""Translates the tensor names found in files to the names that PEFT writes.

PEFT writes `base_model.model.<module>.lora_A.weight`. Files in the wild also have

    <module>.lora_A.weight                        the prefix left out
    base_model.model.base_model.model.<module>    a PeftModel inside another
    module. _orig_mod. _fsdp_wrapped_module.      DistributedDataParallel, compile, FSDP
    <module>.lora_A.default.weight                the state dict as it is in memory
    <module>.modules_to_save.default.weight       likewise
    layers.0.self_attn.q_proj                     a model without its head (AutoModel)
    model.model.layers.0.self_attn.q_proj         a prefix twice
    model.language_model.layers.0.self_attn...    the text model in a multimodal one
    vit.encoder.layer.0.attention.attention.query a module that transformers 5 renamed

A name must identify exactly one tensor of the base; otherwise the error says what was
found.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lorax.interop import files, multimodal, peft_table
from lorax.interop.peft_base import WEIGHT, Base
from lorax.interop.peft_selection import PREFIX

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
FACTORS = (
    "lora_A lora_B lora_E lora_embedding_A lora_embedding_B lora_magnitude_vector"
).split()
TOKENS, ROWS = "token_adapter", "trainable_tokens_delta"
WHOLE, ORIGINAL, LAYER = "modules_to_save", "original_module", "base_layer"
FOREIGN = ("lora_down", "lora_up", "lora.down", "lora.up")
WRITE = (
    f"write '{PREFIX}<module>.lora_A.weight', as model.save_pretrained does in PEFT, "
    "with <module> as model.named_modules() names it"
)
DEPTH = 3  # how many components of a name may be a superfluous prefix


class Names(NamedTuple):
    """How PEFT's names of modules differ from the base's.

    Attributes:
      lacking: a prefix of the base's names that PEFT's names lack.
      outer: for prefixes of the base's names, those in a multimodal model that contains
        the base.
      older: `(present name, older name)` of modules, where PEFT has the older ones.
    """

    lacking: str
    outer: Mapping[str, str]
    older: Sequence[tuple[str, str]] = ()

    def of(self, name: str) -> str:
        """Returns PEFT's name for a module or a parameter of the base."""
        name = _exchanged(name.removeprefix(self.lacking), self.older)
        inner = next((front for front in self.outer if name.startswith(front)), "")
        return self.outer.get(inner, "") + name.removeprefix(inner)


def read(
    tensors: Mapping[str, files.Tensor], suffixes: Collection[str], base: Base
) -> tuple[dict[str, files.Tensor], Names]:
    """Returns the tensors by the base's names, and how PEFT names the modules.

    Args:
      tensors: by their names in the file.
      suffixes: possible suffixes of a module's name: ".lora_A.weight" for LoRA,
        ".lora_A" for AdaLoRA.
      base: the model.

    Raises:
      ValueError: the file has several adapters, two spellings of one tensor, or a
        prefix that matches several modules or none.
    """
    named: dict[str, files.Tensor] = {}
    older: list[tuple[str, str]] = []
    adapters: dict[str, str] = {}
    outer: dict[str, str] = {}
    for key, tensor in tensors.items():
        written, adapter = _plain(key, suffixes, base)
        name = _exchanged(written, base.older)
        if name != written:
            older = [(new, old) for old, new in base.older]
        if whole := multimodal.prefix(name):
            outer[multimodal.PREFIXES[whole]] = whole
            name = multimodal.inner(name, whole)
        if name in named and not _copies(named[name], tensor):
            first = named[name].key
            raise ValueError(f"{first!r} and {key!r} are the same tensor: keep one")
        named[name] = tensor
        if adapter:
            adapters.setdefault(adapter, key)
    if len(adapters) > 1:
        told = ", ".join(f"{name!r} ({key!r})" for name, key in adapters.items())
        raise ValueError(
            f"the file holds the adapters {told}; save one of them with "
            "model.save_pretrained(folder, selected_adapters=[...]) in PEFT"
        )
    drop, front = _prefix(named, base)
    found = {_with(_without(name, drop), front): t for name, t in named.items()}
    return found, Names(front and f"{front}.", outer, older)


def _exchanged(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The name with one module in place of another; `{}` is a number in both."""
    for old, new in pairs:
        pattern = re.escape(old).replace(r"\{\}", r"(\d+)")
        put = new.replace("{}", r"\g<1>")
        name = re.sub(rf"(?<![^.]){pattern}(?![^.])", put, name, count=1)
    return name


def _plain(key: str, suffixes: Collection[str], base: Base) -> tuple[str, str]:
    """The name without wrappers and prefix, and the adapter's name in it, or ""."""
    if any(word in key for word in FOREIGN):
        raise ValueError(f"{key!r} is a name in kohya's form, not PEFT's; {WRITE}")
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1 if parts[0] == "module" else 2 :]
    if ORIGINAL in parts:  # the frozen copy of a module that is saved in full
        parts[parts.index(ORIGINAL)] = LAYER
    if WHOLE in parts:
        at = parts.index(WHOLE)
        whole = ".".join(parts[:at] + parts[at + 1 :])
        if any(_ends(whole, other) for other in [*base.where, base.head + WEIGHT]):
            return whole, ""  # older versions leave the adapter's name out
        return ".".join(parts[:at] + parts[at + 2 :]), parts[at + 1]
    words = _words()
    at = next((i for i, part in enumerate(parts) if part in words), len(parts))
    word, tail = "".join(parts[at : at + 1]), parts[at + 1 :]
    bias = tail[-1:] == ["bias"] and f".{word}.bias" in suffixes
    end = ["bias" if bias else "weight"]
    adapter = tail[0] if tail and tail != end else ""
    if tail not in ([], end, [adapter], [adapter, *end]):
        return ".".join(parts), ""
    bare = ".".join(parts[: at + 1])
    if bias:
        return f"{bare}.bias", adapter
    return bare + (WEIGHT if f".{word}{WEIGHT}" in suffixes else ""), adapter


def _copies(one: files.Tensor, other: files.Tensor) -> bool:
    """True for biases that PEFT's bias="all" writes twice, for fully saved modules."""
    both = one.key.endswith(".bias") and other.key.endswith(".bias")
    return both and np.array_equal(one.read(), other.read())


def _words() -> set[str]:
    """The first component after a module's name, for every type."""
    forms = peft_table.FORMS.values()
    own = {end.split(".")[1] for form in forms for end in form.tensors}
    return {*FACTORS, ROWS, *own}


def _ends(name: str, other: str) -> bool:
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def _prefix(named: Collection[str], base: Base) -> tuple[int, str]:
    """How many leading components to drop from the names, and the prefix to add."""
    known = {key.rpartition(".")[0] for key in base.where} | {base.head} - {""}
    modules = {_module(name) for name in named}
    fronts = sorted({name.partition(".")[0] for name in known if "." in name})
    ways = [(drop, add) for drop in range(DEPTH + 1) for add in ("", *fronts)]
    words = {*fronts, "model", "base_model", multimodal.INSIDE}
    count = {way: _resolved(modules, way, known, words) for way in ways}
    best = max(count.values(), default=0)
    if count[0, ""] == best > 0 or not modules:
        return 0, ""
    found = {
        tuple(sorted(_with(_without(name, way[0]), way[1]) for name in modules)): way
        for way, hits in count.items()
        if hits == best > 0
    }
    if len(found) == 1:
        return next(iter(found.values()))
    seen, like = min(modules), min(known, key=len)
    if found:
        fronts = sorted({front for _, front in found.values()})
        raise ValueError(
            f"modules have names like {seen!r}, which could be in any of {fronts}; "
            f"{WRITE}"
        )
    raise ValueError(
        f"modules have names like {seen!r}, but this base has none of them under any "
        f"prefix (it has {like!r}); is the adapter for another base? If not, {WRITE}"
    )


def _resolved(
    modules: Iterable[str], way: tuple[int, str], known: set[str], words: set[str]
) -> int:
    """How many of the modules the base has, dropping only components in `words`."""
    drop, front = way
    fit = [name for name in modules if set(name.split(".")[:drop]) <= words]
    return sum(_with(_without(name, drop), front) in known for name in fit)


def _module(name: str) -> str:
    """The module that a tensor's name belongs to."""
    parts = name.split(".")
    words = _words() | {LAYER, TOKENS}
    at = next((i for i, part in enumerate(parts) if part in words), -1)
    return ".".join(parts[:at])


def _with(name: str, front: str) -> str:
    return f"{front}.{name}" if front else name


def _without(name: str, drop: int) -> str:
    return name.split(".", drop)[-1] if drop else name
