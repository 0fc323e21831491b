"""What a quantised base costs in quality: one model, one task, several formats.

    python -m experiments.studies.quantized_base \
        --study_dir=docs/results/quantized_base \
        --study_model=SmolLM2-135M-Instruct.Q4_1.gguf

The model is adapted to E2E's pairs with LoRA of rank 8 on every linear kernel, 200
steps of 8 pairs; every base gets the same adapters, rates and batches. Bits per byte
are measured on the first rows of the validation set, before and after. The learning
rate was fixed beforehand and is the same for all. "file" keeps the codes of a GGUF file
as they are.

Every run is a line of `runs.jsonl`, so an interrupted study resumes.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags

import lorax
from configs import gpt2_e2e_lora
from experiments.generation import quantizing, unmerged
from experiments.machine import tables
from experiments.studies import e2e_methods
from experiments.studies.method import comparison, trial

_MODEL = flags.DEFINE_string("study_model", None, "A GGUF file, or a checkpoint.")
_MINUTES = flags.DEFINE_float("base_minutes", None, "Time limit for new runs.")
_SEEDS = flags.DEFINE_list("base_seeds", ["1"], "Seeds of adapters and batches.")

FORMS = ("", "nf4", "int8", "int4", "fp8")
"""`config.model.quantize` of every row; the others are compared with the first."""
STEPS, ROWS, RATE = 200, 200, 1e-3


def configured(source: str, form: str, **fields: Any) -> ml_collections.ConfigDict:
    """Returns the config of a row."""
    config = gpt2_e2e_lora.get_config("runlocal").unlock()
    config.run.steps = STEPS
    config.model.source, config.model.quantize = source, form
    config.adapter.rank, config.adapter.alpha = 8, 16.0
    config.optimizer.warmup_steps = STEPS // 10
    config.data.batch_size, config.data.lengths = 8, (64, 96, 128, 192)
    config.update_from_flattened_dict(fields)
    return config.lock()


def measured(config: ml_collections.ConfigDict, seed: int, rows: int) -> dict[str, Any]:
    """Makes one run: bits per byte before and after, and the size of the base."""
    setting = e2e_methods.make_setting(config, rows)
    make = trial.make_run(config, setting.loss_fn, setting.base, setting.train)
    before = setting.report(unmerged.Unmerged({}, setting.base))
    curve = make(seed, RATE, setting.report, config.run.steps).curve
    return {"curve": curve, "before": before, "bits": bits_a_weight(setting.base)}


def bits_a_weight(params: Any) -> float:
    """Returns the bits per weight of the quantised kernels, or of a dense base."""
    leaves = [*lorax.tree.flatten(params).values()]
    packed = [leaf for leaf in leaves if quantizing.packed(leaf)]
    counted = packed or leaves
    return 8 * sum(x.nbytes for x in counted) / sum(x.size for x in counted)


def table(lines: dict[str, list[dict[str, Any]]]) -> str:
    """Returns markdown with a row for each base, compared with the dense one's gain.

    The share is measured from where the dense base starts, so that a base that starts
    worse because it is rounded does not gain by it.

    Args:
      lines: by format, a line for each seed.
    """
    after = {
        form: np.array([line["curve"][-1] for line in found])
        for form, found in lines.items()
    }
    start = np.array([line["before"] for line in lines[FORMS[0]]])
    rows = []
    for form, found in lines.items():
        share = (start - after[form]) / (start - after[FORMS[0]])
        rows.append(
            [
                form or "float32",
                f"{found[0]['bits']:.2f}",
                f"{found[0]['before']:.4f}",
                f"{after[form].mean():.4f}",
                f"{share.mean():.1%}",
            ]
        )
    names = ["base", "bits a weight", "before", "after", "of float32's gain"]
    return tables.markdown(names, rows)


def main(argv: Sequence[str]) -> None:
    """Resumes the study, and prints the table."""
    del argv
    folder = comparison.folder("quantized_base")
    source = _MODEL.value or ""
    forms = (*FORMS, quantizing.OF_FILE) if source.endswith(".gguf") else FORMS
    configs = {form: configured(source, form) for form in forms}
    settings = {form: _digest(config) for form, config in configs.items()}
    runs = comparison.Runs(folder / "runs.jsonl", settings, _MINUTES.value)
    seeds, lines = [int(seed) for seed in _SEEDS.value], {}
    for form, config in configs.items():
        try:
            lines[form] = [
                runs.line((form, seed), functools.partial(measured, config, seed, ROWS))
                for seed in seeds
            ]
        except comparison.NotRun as error:
            print(f"CUT SHORT, not run: {form} {error}")
        jax.clear_caches()
    if FORMS[0] in lines:
        text = table(lines)
        (folder / "table.md").write_text(f"{text}\n")
        print(text)


def _digest(config: ml_collections.ConfigDict) -> str:
    """Returns a digest of what a run depends on; the model counts by its name only."""
    name = config.model.source.rpartition("/")[2]
    sections = [config[name].to_dict() for name in ("adapter", "optimizer")]
    data = [config.data[n] for n in ("form", "train_rows", "lengths", "batch_size")]
    told = json.dumps([name, config.model.quantize, STEPS, ROWS, RATE, sections, data])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


if __name__ == "__main__":
    flags.mark_flag_as_required("study_model")
    app.run(main)
