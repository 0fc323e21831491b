"""SmolLM2-135M-Instruct learns to prefer short descriptions: DPO with LoRA, on a CPU.

    python -m experiments.studies.shorter_answers --study_rows=preferences
    lorax run --config=smollm2_preferences_dpo
    lorax run --config=smollm2_preferences_dpo:runlocal

No paper claims a number here; the results are in docs/results/preferences.md. The first
command writes the rows: of two E2E references that both mention every fact, the shorter
one is preferred. beta is the paper's (Rafailov et al., arXiv:2305.18290); the learning
rate was fixed beforehand and not tuned.

Useful overrides: `--config.run.loss=simpo`, and
`--config.run.loss_options="(('beta', 0.3),)"`. For the checkpoint see
docs/howto/gguf.md.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "smollm2_preferences_dpo"
    config.run.steps = 60  # of 4 pairs: half an epoch
    config.run.log_every = 10
    config.run.loss = "dpo"
    config.run.loss_options = (("beta", 0.1),)

    config.model.source = "SmolLM2-135M-Instruct.Q4_1.gguf"

    config.adapter.rank = 8
    config.adapter.alpha = 16.0

    config.optimizer.learning_rate.lora = 2e-4
    config.optimizer.warmup_steps = 6

    config.data.task = "preferences"
    config.data.train = "preferences/train.jsonl"  # below the folder of data sets
    config.data.valid = "preferences/valid.jsonl"
    config.data.template = "{prompt}"  # for text prompts; chats have their own
    config.data.lengths = (128, 160, 208)
    config.data.batch_size = 4

    config.eval.every = 0
    config.eval.rows = config.eval.final_rows = 64
    config.eval.batch_size = 8

    if args["runlocal"]:
        config.run.steps, config.run.log_every = 4, 2
        config.data.train_rows = config.eval.rows = config.eval.final_rows = 8
    return config.lock()
