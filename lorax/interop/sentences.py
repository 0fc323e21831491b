"""Pooling and normalisation from a sentence-transformers directory.

    model, params = hf.load(directory)  # a bare encoder
    pool = sentences.pooling(directory)
    embeddings = pool(model.apply({"params": params}, tokens, real=real), real)

References:
  Reimers and Gurevych, https://github.com/UKPLab/sentence-transformers: `modules.json`,
  `Pooling`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from lorax import untrusted
from lorax.interop import files
from lorax.models.pooling import MODES, Pooling

FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The flag for each mode in configs before version 5."""

SIZES = ("word_embedding_dimension", "embedding_dimension")
KNOWN = {*FLAGS, *SIZES, "pooling_mode", "include_prompt"}


def pooling(directory: str | pathlib.Path) -> Pooling:
    """Returns the pooling and normalisation that `modules.json` describes.

    Raises:
      FileNotFoundError: there is no `modules.json`.
      ValueError: there is a module other than encoder, pooling and normalisation;
        several modes at once; or the prompt is excluded from the pooling.
    """
    directory = pathlib.Path(directory)
    at = files.inside(directory, "modules.json")
    listed = files.read_json(at, kind=list)
    found, normalize = None, False
    for module in listed:
        kind = untrusted.field(module, "type", untrusted.TEXT, f"{at}: ")
        name = kind.rpartition(".")[2]
        if name == "Pooling" and found is None:
            path = untrusted.field(module, "path", untrusted.TEXT, f"{at}: ")
            config = files.inside(directory, f"{path}/config.json")
            found = _mode(files.read_json(config), str(config))
        elif name == "Normalize" and found is not None:
            normalize = True
        elif name != "Transformer" or found is not None:
            raise ValueError(
                f"{at}: the module {kind!r} is not implemented here; supported are a "
                "Transformer, then Pooling, then Normalize"
            )
    if found is None:
        raise ValueError(f"{at}: there is no Pooling among the modules")
    return Pooling(found, normalize)


def _mode(config: Mapping[str, Any], where: str) -> str:
    """The one mode of a Pooling's config."""
    if unknown := sorted(config.keys() - KNOWN):
        raise ValueError(f"{where}: unknown fields {', '.join(unknown)}")
    if not config.get("include_prompt", True):
        raise ValueError(f"{where}: include_prompt=False is not implemented, only True")
    said = config.get("pooling_mode")
    modes = [said] if isinstance(said, str) else list(said or ())
    modes += [mode for flag, mode in FLAGS.items() if config.get(flag) is True]
    if len(modes) != 1 or modes[0] not in MODES:
        raise ValueError(
            f"{where}: the modes are {untrusted.shown(modes)}; there must be exactly "
            f"one of {', '.join(MODES)}"
        )
    return modes[0]
