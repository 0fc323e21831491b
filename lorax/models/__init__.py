"""Model families whose weights lorax reads and writes.

Each file holds one family: `Config` (with `from_hf` and `to_hf`), `Model`, and
`entries(config)`, the table of its parameters on disk and here.
"""

from types import ModuleType

from lorax.models import bert, gpt2, llama, roberta, t5

FAMILIES: dict[str, ModuleType] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "roberta": roberta,
    "t5": t5,
}
"""By `model_type` of a config.json."""
