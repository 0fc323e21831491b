"""Model families whose weights lorax reads and writes.

Each file holds one family: `Config` (with `from_hf` and `to_hf`), `Model`, and
`entries(config)`, the table of its parameters on disk and here.
"""

from types import ModuleType

from lorax.models import gpt2, llama

FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
}
"""By `model_type` of a config.json."""
