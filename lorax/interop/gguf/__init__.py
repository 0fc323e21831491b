"""llama.cpp's GGUF files: loads models and adapters, saves adapters."""

try:
    import gguf as _library  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lorax.interop.gguf needs the package `gguf`: pip install 'lorax-flax[gguf]'"
    ) from error

from lorax.interop.gguf.adapters import load_adapters, save_adapters
from lorax.interop.gguf.loading import load
from lorax.interop.gguf.tokenizer import tokenizer_files

__all__ = ["load", "load_adapters", "save_adapters", "tokenizer_files"]
