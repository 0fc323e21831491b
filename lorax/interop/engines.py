"""Which serving engines accept an adapter in PEFT's layout, and why others do not.

    for verdict in engines.check("runs/x/peft", model.config):
        print(verdict)

PEFT's directory is the common format, and each engine supports a part of it. The rules
restate those of the engines' own loaders. Engines change, and a rule is only as recent
as its reference:

vLLM: `vllm/lora/lora_model.py` (commit 0306474), `peft_helper.py` (0214369), `utils.py`
(001e63a), `vllm/config/lora.py` (01230b4), `docs/models/supported_models.md` (0046f77).
SGLang: `python/sglang/srt/lora/lora_config.py` (0ceb81f), `utils.py` (01235a1) and
`lora.py` (002c60a). llama.cpp: `src/llama-adapter.cpp` (0650ea8), and lorax's own
`gguf.save_adapters`, which writes its files. No engine was run.

References:
  Kwon et al., vLLM, https://github.com/vllm-project/vllm. Zheng et al., SGLang,
  https://github.com/sgl-project/sglang. https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lorax.interop import files, peft

UNIFORM = "write it with peft.save(..., uniform=True)"
MERGED = "merge it (lorax.merge, or --form=merged) and serve the model"


class Verdict(NamedTuple):
    """What an engine does with an adapter.

    Attributes:
      engine: its name.
      reasons: why it does not accept the adapter, and what to do; empty if it does.
      flags: the flags to start the engine with.
    """

    engine: str
    reasons: tuple[str, ...]
    flags: str = ""

    @property
    def takes(self) -> bool:
        """True if the engine accepts the adapter."""
        return not self.reasons

    def __str__(self) -> str:
        """One line, plus one for every reason."""
        if self.takes:
            return f"{self.engine}: yes" + (
                f", with {self.flags}" if self.flags else ""
            )
        return "\n  ".join([f"{self.engine}: no", *self.reasons])


class Written(NamedTuple):
    """An adapter on disk, as the rules see it.

    Attributes:
      fields: of adapter_config.json.
      shapes: of the tensors, by name.
      family: the base's `model_type`.
      tied: whether the base's head is its embedding.
    """

    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    family: str
    tied: bool

    @property
    def rank(self) -> int:
        """The largest rank; for experts, that of a single expert."""
        found = [shape[1] for n, shape in self.shapes.items() if n.endswith(B_ENDS)]
        pattern = (self.fields.get("rank_pattern") or {}).values()
        if self.fields.get("target_parameters"):
            found = []
        known = [self.fields.get("r", 0), *(n for n in pattern if isinstance(n, int))]
        return max([*found, *known])

    @property
    def modules(self) -> set[str]:
        """The last components of the names of modules with factors."""
        names = (
            name.partition(".lora_")[0] for name in self.shapes if ".lora_" in name
        )
        return {name.removesuffix(".base_layer").rpartition(".")[2] for name in names}


B_ENDS = (".lora_B.weight", ".lora_embedding_B")


def check(directory: str | pathlib.Path, config: Any) -> list[Verdict]:
    """Returns, for each engine, whether it accepts an adapter.

    Args:
      directory: written by `peft.save` or by PEFT.
      config: the base's config, `model.config`.

    Raises:
      FileNotFoundError: the files do not exist.
      ValueError: a file is damaged.
    """
    folder = pathlib.Path(directory)
    fields = files.read_json(files.inside(folder, peft.CONFIG))
    tensors = files.open_tensors(files.inside(folder, peft.TENSORS))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    family = config.to_hf()["model_type"]
    written = Written(fields, shapes, family, bool(getattr(config, "tied", False)))
    return [
        Verdict(engine, tuple(rules(written)), flags(written))
        for engine, (rules, flags) in ENGINES.items()
    ]


def _plain_lora(written: Written, engine: str) -> Iterator[str]:
    """What every serving engine requires: LoRA factors, and nothing else."""
    fields = written.fields
    if fields.get("peft_type") != "LORA":
        yield (
            f"peft_type={fields.get('peft_type')}: {engine} reads only LORA; convert a "
            f"product of factors with compose.to_lora, otherwise {MERGED}"
        )
    if fields.get("use_dora"):
        yield f"use_dora: {engine} does not support magnitudes; {MERGED}"
    if fields.get("modules_to_save"):
        yield f"modules_to_save={fields['modules_to_save']}: full modules; {MERGED}"
    if fields.get("bias", "none") != "none" or fields.get("lora_bias"):
        yield f"bias: {engine} does not read biases; {MERGED}"
    if fields.get("trainable_token_indices"):
        yield f"trainable_token_indices: rows of the embedding; {MERGED}"
    if fields.get("layer_replication"):
        yield f"layer_replication: {engine} does not copy layers; {MERGED}"


def _one_rank(written: Written, engine: str) -> Iterator[str]:
    """Requires one rank and one alpha: patterns are ignored or refused."""
    for name, common in ("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"):
        own = written.fields.get(name) or {}
        if any(value != written.fields.get(common) for value in own.values()):
            yield (
                f"{name}: {engine} uses one {common} for all modules, so scales would "
                f"be wrong; {UNIFORM}"
            )


VLLM_FAMILIES = frozenset(
    """
    gemma gemma2 gemma3_text gemma4_text gpt_oss llama ministral mistral mixtral olmo2
    phi3 qwen2 qwen3 qwen3_moe smollm3
    """.split()
)
"""The families marked under "LoRA" in vLLM's list of models."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank: `MaxLoRARanks` in `vllm/config/lora.py`; default 16."""


def _vllm(written: Written) -> Iterator[str]:
    yield from _plain_lora(written, "vLLM")
    yield from _one_rank(written, "vLLM")
    if written.family not in VLLM_FAMILIES:
        yield f"vLLM does not serve adapters for {written.family!r}; {MERGED}"
    if written.rank > VLLM_RANKS[-1]:
        yield (
            f"rank {written.rank}: vLLM's largest is {VLLM_RANKS[-1]}; "
            "reduce it with compose.resize"
        )
    if "experts" in written.modules and not _both_kernels(written):
        yield (
            "target_parameters: vLLM takes <experts>.base_layer for gate_up_proj and "
            "<experts> for down_proj, so an adapter of only one of them could be "
            f"mistaken for the other; adapt both, or {MERGED}"
        )


def _both_kernels(written: Written) -> bool:
    """True if every module of experts has factors for both of its kernels."""
    own = {n.partition(".lora_")[0] for n in written.shapes if ".experts" in n}
    outer = {name for name in own if not name.endswith(".base_layer")}
    return own == outer | {f"{name}.base_layer" for name in outer}


def _vllm_flags(written: Written) -> str:
    rank = next((n for n in VLLM_RANKS if n >= written.rank), VLLM_RANKS[-1])
    return f"--enable-lora --max-lora-rank={rank}"


SGLANG_MODULES = frozenset(
    """
    q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head
    """.split()
)
"""Those of `_KNOWN_LORA_TARGET_MODULES` that lorax's families have, by PEFT's names."""


def _sglang(written: Written) -> Iterator[str]:
    yield from _plain_lora(written, "SGLang")
    yield from _one_rank(written, "SGLang")
    named = written.fields.get("target_modules")
    if isinstance(named, str) and named not in ("all", "all-linear"):
        yield f"target_modules={named!r}: SGLang reads lists of names, not patterns"
    if written.fields.get("use_rslora"):
        yield "use_rslora: SGLang's scale is alpha / r; save with rank_stabilized=False"
    if odd := sorted(written.modules - SGLANG_MODULES):
        yield f"SGLang does not support adapters of {', '.join(odd)}; {MERGED}"


def _sglang_flags(written: Written) -> str:
    names = sorted(written.modules)
    return (
        f"--enable-lora --max-lora-rank={written.rank} "
        f"--lora-target-modules {' '.join(names)}"
    )


GGUF_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The families that `lorax.interop.gguf` writes."""


def _llama_cpp(written: Written) -> Iterator[str]:
    yield from _plain_lora(written, "llama.cpp")
    if written.family not in GGUF_FAMILIES:
        yield (
            f"{written.family!r}: lorax writes GGUF adapters only for "
            f"{', '.join(GGUF_FAMILIES)}; {MERGED}"
        )
    if written.tied and {"embed_tokens", "lm_head"} & written.modules:
        yield f"llama.cpp cannot adapt an embedding that is also the head; {MERGED}"
    if written.fields.get("target_parameters"):
        yield f"target_parameters: only pairs of matrices are supported; {MERGED}"


def _no_rule(written: Written) -> Iterator[str]:
    del written
    yield from ()


Rules = Callable[[Written], Iterator[str]]
ENGINES: dict[str, tuple[Rules, Callable[[Written], str]]] = {
    "PEFT": (_no_rule, lambda _: ""),
    "vLLM": (_vllm, _vllm_flags),
    "SGLang": (_sglang, _sglang_flags),
    "llama.cpp": (_llama_cpp, lambda _: "a file of gguf.save_adapters, --lora"),
}
"""The rules of each engine, and the flags that it needs."""
