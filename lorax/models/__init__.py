"""Model families whose weights lorax reads and writes.

Each file holds one family: `Config` (with `from_hf` and `to_hf`), `Model`, and
`entries(config)`, the table of its parameters on disk and here.
"""

from types import ModuleType

from lorax.models import gpt2

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2}
"""By `model_type` of a config.json."""
