"""Exports an adapted model: merged into a checkpoint, or as an adapter."""

import json
import pathlib
import shutil
from typing import Any

import lorax
from experiments.data import tokenization
from experiments.generation import loading, quantizing
from lorax import checkpoint, compose, optim, tree
from lorax.interop import hf, peft
from lorax.types import Adapters

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "*.jinja", "generation_config*")


def export(
    source: str,
    adapter: str,
    to: str,
    form: str,
    *,
    initial: str | None = None,
    adalora_shrink: bool = False,
    quantize: str = "",
    scan: bool = True,
    uniform: bool = False,
) -> Any:
    """Writes a merged checkpoint, or an adapter.

    Args:
      source: the base's checkpoint, or its GGUF file.
      adapter: folder of adapters.
      to: folder to write; it must not be the base's.
      form: "merged", "peft" or "lorax".
      initial: folder of the initial adapters; None for `initial/` beside `adapter` if
        there is one.
      adalora_shrink: whether to leave out AdaLoRA's pruned triplets.
      quantize: `config.model.quantize` of the run. A merged model is dense, and holds
        the base as quantised; an adapter beside `initial/` is for the original base.
      scan: `config.model.scan` of the run.
      uniform: whether an adapter for PEFT gets one rank and one alpha for all modules.

    Returns:
      The config of the base.

    Raises:
      ValueError: `to` is the base's own folder, the adapters belong to another base, or
        there is nothing to shrink.
    """
    if adalora_shrink and form == "merged":
        raise ValueError(
            "--adalora_shrink with --form=merged: a merged kernel has no triplets to "
            "leave out; remove the flag, or give --form=peft or --form=lorax"
        )
    path, target = loading.find(source), pathlib.Path(to)
    if target.resolve() == path.resolve():
        raise ValueError(f"--to={to} is the base's own folder; give another one")
    beside = pathlib.Path(initial or pathlib.Path(adapter).parent / "initial")
    start = checkpoint.load_adapters(beside) if initial or beside.is_dir() else None
    model, params = loading.read(path, quantize if start is None else "", scan=scan)
    config = model.config
    if start is None:
        adapters, params = loading.load_adapters(adapter, model, params)
    elif quantize and form == "merged":  # the run quantised what the init left
        params = quantizing.quantized(model, _moved(params, start), quantize)
        adapters = checkpoint.load_adapters(adapter)
    else:  # they fit the moved base, which is not here: to_lora checks what it can
        adapters = compose.to_lora(checkpoint.load_adapters(adapter), start)
    if adalora_shrink:
        adapters = optim.adalora_shrink(adapters)
    if form == "peft":
        named: Any = {"params": params, "base_name": source, "uniform": uniform}
        peft.save(target, adapters, config, **named)
        return config
    if form == "lorax":
        checkpoint.save_adapters(target, adapters, params)
        return config
    hf.save(target, config, lorax.merge(adapters, params))
    _write_tokenizer(path, target)
    return config


def _moved(params: Any, start: Adapters) -> Any:
    """Returns the base without the part that an init moved into the adapters."""
    leaves = tree.flatten(params)
    wide = {path: leaves[path] - a.delta(leaves[path]) for path, a in start.items()}
    moved = {path: w.astype(leaves[path].dtype) for path, w in wide.items()}
    return tree.replace(params, moved)


def _write_tokenizer(path: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the files of the base's tokenizer beside the merged model."""
    if tokenization.is_gguf(path):
        content, configs = tokenization.read_files(path)
        (target / "tokenizer.json").write_bytes(content)
        told = {name: value for name, value in configs.items() if value}
        for name, value in told.items():
            (target / name).write_text(json.dumps(value, indent=2) + "\n")
        return
    for pattern in TOKENIZER:
        for file in path.glob(pattern):
            shutil.copyfile(file, target / file.name)
