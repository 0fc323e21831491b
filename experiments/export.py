r"""Writes an adapted model for other programs: merged, or as an adapter.

    lorax export --base=stories260k --trained=runs/x/adapter \
        --form=merged --to=merged   # a checkpoint that transformers and lorax load
    lorax export --base=stories260k --trained=runs/x/adapter \
        --form=peft --to=adapter --check  # for peft's PeftModel.from_pretrained
    lorax export --base=stories260k --trained=runs/x/adapter \
        --form=lorax --adalora_shrink --to=adapter   # AdaLoRA at its final ranks

A merged model is written with its tokenizer's files. Where the init moved a part of the
base (PiSSA, LoRA-GA and others), the run wrote `initial/` beside `adapter/`. It is
found there, or given by `--initial`, and the export is for the original base.

`--check` says which engines (vLLM, SGLang, llama.cpp) load what `--form=peft` wrote,
with which flags, and otherwise why not. Most engines that ignore rank and alpha
patterns load it with `--uniform`: one rank and one alpha for all modules, and still the
same function.

Adapters of a class of your own need the module that registers it:
`--plugins=my_package.methods`.

Adapters that were trained on a quantised base need the run's `--quantize=nf4`; the
merged model is dense again.

`--adalora_shrink` leaves out the triplets that AdaLoRA pruned, those with lam = 0. The
trained adapters still hold them, and an optimiser other than `optim.adalora` would
revive them.
"""

from collections.abc import Sequence

from absl import app, flags

from experiments.generation import exporting
from experiments.reading import command, plugins
from lorax.interop import engines

_MODEL = flags.DEFINE_string("base", None, "The checkpoint: a directory or a hub id.")
_ADAPTER = flags.DEFINE_string("trained", None, "Folder of lorax or PEFT adapters.")
_INITIAL = flags.DEFINE_string(
    "initial", None, "Folder of the initial adapters, if it is not beside --trained."
)
_TO = flags.DEFINE_string("to", None, "Folder to write; created if missing.")
_FORM = flags.DEFINE_enum(
    "form", "merged", ["merged", "peft", "lorax"], "What to write."
)
_QUANTIZE = flags.DEFINE_string("quantize", "", "The run's config.model.quantize.")
_SCAN = flags.DEFINE_bool("scan", True, "The run's config.model.scan.")
_PLUGINS = flags.DEFINE_list("plugins", [], "Modules that register adapters.")
_CHECK = flags.DEFINE_bool(
    "check", False, "With --form=peft: say which engines can load what was written."
)
_UNIFORM = flags.DEFINE_bool(
    "uniform", False, "With --form=peft: one rank and one alpha for all modules."
)
_SHRINK = flags.DEFINE_bool(
    "adalora_shrink", False, "Leave out the triplets that AdaLoRA pruned."
)


def main(argv: Sequence[str]) -> None:
    """Exports as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are not flags: {argv[1:]}")
    with command.refusing():
        plugins.import_all(_PLUGINS.value or [], "--plugins")
    if _FORM.value != "peft" and (_CHECK.value or _UNIFORM.value):
        raise app.UsageError("--check and --uniform need --form=peft")
    config = exporting.export(
        _MODEL.value or "",
        _ADAPTER.value or "",
        _TO.value or "",
        _FORM.value,
        initial=_INITIAL.value,
        adalora_shrink=_SHRINK.value,
        quantize=_QUANTIZE.value,
        scan=_SCAN.value,
        uniform=_UNIFORM.value,
    )
    print(f"{_FORM.value}: written to {_TO.value}")
    for verdict in engines.check(_TO.value or "", config) if _CHECK.value else ():
        print(verdict)


if __name__ == "__main__":
    flags.mark_flags_as_required(["base", "trained", "to"])
    command.run(main)
