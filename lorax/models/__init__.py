"""Model families whose weights lorax reads and writes.

Each file holds one family: `Config` (with `from_hf` and `to_hf`), `Model`, and
`entries(config)`, the table of its parameters on disk and here.
"""

from types import ModuleType

from lorax.models import (
    bert,
    deberta,
    gemma,
    gemma4,
    gpt2,
    llama,
    mixture,
    roberta,
    siglip,
    t5,
    vit,
)

FAMILIES: dict[str, ModuleType] = {
    "bert": bert,
    "deberta-v2": deberta,
    "gemma": gemma,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "gemma4_text": gemma4,
    "gpt2": gpt2,
    "gpt_oss": mixture,
    "llama": llama,
    "ministral": llama,
    "mistral": llama,
    "mixtral": mixture,
    "olmo2": llama,
    "phi3": llama,
    "qwen2": llama,
    "qwen3": llama,
    "qwen3_moe": mixture,
    "roberta": roberta,
    "siglip": siglip,
    "siglip_vision_model": siglip,
    "smollm3": llama,
    "t5": t5,
    "vit": vit,
}
"""Families by the `model_type` of a config.json."""

ATTENTION = r".*/(cross_|pos_)?(q|k|v|qkv|o)/kernel"
"""Pattern for a `Target`: every attention kernel, in all families."""

QUERY_VALUE = r".*/(cross_)?(q|v)/kernel"
"""Queries and values, as in the LoRA paper; GPT-2's are slices of one kernel."""

MLP = r".*/(up|gate|gate_up|down)/kernel"
"""Every MLP kernel, experts included; routers are not."""

EXPERTS = r".*/experts/(gate_up|down)/kernel"
"""The MLP kernels of mixtures of experts."""
