"""Quickstart: a byte model of Python source, adapted to the English of its manual.

    python -m experiments.main --config=configs/quickstart.py

A decoder of 1.4 M parameters is pretrained on the source code of the standard library
(cached), then adapted to the language reference in `pydoc_data.topics` with LoRA and
with full fine-tuning. No paper claims a number here; the aim is that LoRA gains 80 % of
what full fine-tuning gains, with less than 5 % of the parameters trained.

Learning rates were tuned by `python -m experiments.tune --config=configs/quickstart.py`
on documents apart from those reported (bits per byte there; the best is bracketed):
LoRA 5e-3 2.154, 1e-2 2.123, 2e-2 2.140; full fine-tuning 1e-3 2.056, 2e-3 2.052, 4e-3
2.104. One seed each. LoRA's share falls as training goes on, for full fine-tuning has
further to go: 85 % at 90 steps, 82 % at 120 (same rates, best there too).

Overrides one is likely to want: `--config.adapter.rank=4`, `--config.run.steps=400`.
Many LoRA runs at once, on one base and in one program, a row of the table each:
`--config.population.learning_rate="(5e-3, 1e-2, 2e-2)" --config.population.rank="(8,
8, 4)"`.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`, sizes to test the wiring with."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.sections()

    config.run.name = "quickstart"
    config.run.seed = 0
    config.run.methods = ("lora", "full")  # in order; LoRA is held to "full"
    config.run.plugins = ()  # modules that register methods of your own
    config.run.steps = 90
    config.run.log_every = 10
    config.run.cache_dir = ""  # "" for $XDG_CACHE_HOME/lorax, else ~/.cache/lorax

    config.model.vocabulary = 256  # bytes
    config.model.layers = 2
    config.model.width = 256
    config.model.heads = 4  # of 64: on a CPU attention costs by the head
    config.model.hidden = 768
    config.model.pretrain = ml_collections.ConfigDict()
    config.model.pretrain.name = "muon"  # learns more than AdamW in so few steps
    config.model.pretrain.steps = 350
    config.model.pretrain.batch_size = 16
    config.model.pretrain.learning_rate = 2e-2
    config.model.pretrain.adam_learning_rate = 4e-3  # embedding, head, norms
    config.model.pretrain.warmup_steps = 50
    config.model.pretrain.final_share = 0.05
    config.model.pretrain.b1 = 0.9
    config.model.pretrain.b2 = 0.98
    config.model.pretrain.weight_decay = 0.1
    config.model.pretrain.clip_norm = 1.0

    config.adapter.patterns = ("all-linear", "head/kernel")
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.adapter.adapter = "lora"  # any of lorax.adapters.REGISTRY
    config.adapter.scaling = "standard"
    config.adapter.init = "standard"  # any of lorax.inits.REGISTRY
    config.adapter.options = ()  # of init and adapter, such as (("gamma", 64.0),)
    config.adapter.calibration_batches = 8  # for inits that look at gradients
    config.adapter.dropout = 0.0
    config.adapter.train_whole = (".*norm.*/scale",)  # 0.1 % of the leaves

    config.optimizer.name = (
        "adamw"  # of experiments.trainer.optimizers.READY, or "chain"
    )
    config.optimizer.options = ()  # of that optimiser, such as (("ratio", 16.0),)
    config.optimizer.chain = ()  # links (name, arguments), for "chain"
    config.optimizer.wrap = ()  # around it, such as (("accumulate", 4),)
    config.optimizer.learning_rate = ml_collections.ConfigDict()
    config.optimizer.learning_rate.lora = 1e-2
    config.optimizer.learning_rate.full = 2e-3
    config.optimizer.warmup_steps = 10
    config.optimizer.final_share = 0.05
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.tuned = (
        "Tuned to a factor of 2 at this config's rank and steps, on other held-out "
        "documents: `python -m experiments.tune`."
    )

    config.data.length = 128  # bytes a window
    config.data.batch_size = 16

    # One device: nothing is sharded.

    config.eval.every = 30
    config.eval.batch_size = 32
    config.eval.source_bytes = 32_768  # of held-out source, to see what is forgotten
    config.eval.prompt = 'The "with" statement'
    config.eval.sample_bytes = 240
    config.eval.temperature = 0.5

    if args["runlocal"]:
        config.run.steps = config.model.pretrain.steps = 4
        config.run.log_every = config.eval.every = 2
        config.model.layers, config.model.width, config.model.heads = 2, 32, 1
        config.model.hidden = 64
        config.data.length, config.data.batch_size = 32, 4
        config.model.pretrain.batch_size = 4
        config.eval.source_bytes = 2_048
        config.eval.sample_bytes = 8
    return config.lock()
