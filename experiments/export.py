"""Writes an adapted model for other programs: merged, or as an adapter.

    python -m experiments.export --base=stories260k --trained=runs/x/adapter \
        --form=merged --to=merged   # a checkpoint that transformers and lorax load
    python -m experiments.export --base=stories260k --trained=runs/x/adapter \
        --form=peft --to=adapter    # for peft's PeftModel.from_pretrained
    python -m experiments.export --base=stories260k --trained=runs/x/adapter \
        --form=lorax --adalora_shrink --to=adapter   # AdaLoRA at the ranks it came to

The tokenizer's files go along with a merged model. Where the init moved a part of the
base (PiSSA, LoRA-GA and others), the run left `initial/` beside `adapter/`: it is found
there, or given by `--initial`, and what is written is for the original base.

Adapters of a class that lorax does not have need the module that registers it:
`--plugins=my_package.methods`.

`--adalora_shrink` leaves out AdaLoRA's pruned triplets, those with lam = 0. As trained
they are still there, and an optimiser other than `optim.adalora` would revive them.
"""

import pathlib
import shutil
from collections.abc import Sequence

from absl import app, flags

import lorax
from experiments import command, loading, plugins
from lorax import checkpoint, compose, optim
from lorax.interop import hf, peft

_MODEL = flags.DEFINE_string("base", None, "The checkpoint: a directory or a hub id.")
_ADAPTER = flags.DEFINE_string("trained", None, "Folder of adapters, ours or PEFT's.")
_INITIAL = flags.DEFINE_string("initial", None, "Folder of the adapters at the start.")
_TO = flags.DEFINE_string("to", None, "Folder to write; made if need be.")
_FORM = flags.DEFINE_enum(
    "form", "merged", ["merged", "peft", "lorax"], "What to write."
)
_PLUGINS = flags.DEFINE_list("plugins", [], "Modules that register its classes.")
_SHRINK = flags.DEFINE_bool("adalora_shrink", False, "Leave out pruned triplets.")

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "*.jinja", "generation_config*")


def export(
    source: str,
    adapter: str,
    to: str,
    form: str,
    *,
    initial: str | None = None,
    adalora_shrink: bool = False,
) -> None:
    """Writes a merged checkpoint, or an adapter.

    Args:
      source: the base's checkpoint.
      adapter: folder of adapters.
      to: folder to write; it must not be the base's.
      form: "merged", "peft" or "lorax".
      initial: folder of the adapters at the start; None for `initial/` beside `adapter`
        if there is one.
      adalora_shrink: without AdaLoRA's pruned triplets.

    Raises:
      ValueError: `to` is the base's own folder, the adapters belong to another base, or
        there is nothing to shrink.
    """
    if adalora_shrink and form == "merged":
        raise ValueError(
            "--adalora_shrink with --form=merged: a merged kernel has no triplets to "
            "leave out; leave the flag out, or write --form=peft or lorax"
        )
    directory, target = loading.find(source), pathlib.Path(to)
    if target.resolve() == directory.resolve():
        raise ValueError(f"--to={to} is the base's own folder: give another")
    model, params = hf.load(directory)
    config = model.config
    beside = pathlib.Path(initial or pathlib.Path(adapter).parent / "initial")
    start = checkpoint.load_adapters(beside) if initial or beside.is_dir() else None
    if start is None:
        adapters, params = loading.load_adapters(adapter, model, params)
    else:  # of the moved base, which is not at hand: to_lora checks what can be checked
        adapters = compose.to_lora(checkpoint.load_adapters(adapter), start)
    if adalora_shrink:
        adapters = optim.adalora_shrink(adapters)
    if form == "peft":
        peft.save(target, adapters, config, params=params, base_name=source)
        return
    if form == "lorax":
        checkpoint.save_adapters(target, adapters, params)
        return
    hf.save(target, config, lorax.merge(adapters, params))
    for pattern in TOKENIZER:
        for file in directory.glob(pattern):
            shutil.copyfile(file, target / file.name)


def main(argv: Sequence[str]) -> None:
    """Exports as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    with command.refusing():
        plugins.import_all(_PLUGINS.value or [], "--plugins")
    export(
        _MODEL.value or "",
        _ADAPTER.value or "",
        _TO.value or "",
        _FORM.value,
        initial=_INITIAL.value,
        adalora_shrink=_SHRINK.value,
    )
    print(f"{_FORM.value}: written to {_TO.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["base", "trained", "to"])
    command.run(main)
