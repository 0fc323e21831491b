"""Quickstart: a byte model of Python source, adapted to the English of Python's manual.

    lorax run --config=quickstart

A decoder of 1.4 M parameters is pretrained on the source code of the standard library
(cached), then adapted to the language reference in `pydoc_data.topics` with LoRA and
with full fine-tuning. No paper claims a number here; the aim is for LoRA to gain 80 %
of what full fine-tuning gains, with less than 5 % of the parameters trained.

Learning rates were tuned with `lorax tune --config=quickstart` on documents other than
those reported (bits per byte on them; the best is bracketed): LoRA 5e-3 2.154, 1e-2
2.123, 2e-2 2.140; full fine-tuning 1e-3 2.056, 2e-3 2.052, 4e-3 2.104. One seed each.
LoRA's share falls as training goes on, because full fine-tuning keeps improving for
longer: 85 % at 90 steps, 82 % at 120 (same rates, which are best there too).

Useful overrides: `--config.adapter.rank=4`, `--config.run.steps=400`. To train many
LoRA runs at once, on one base and in one program, with a row of the table for each:
`--config.population.learning_rate="(5e-3, 1e-2, 2e-2)" --config.population.rank="(8,
8, 4)"`.
"""

import ml_collections

from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`, tiny sizes for a smoke test."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.sections()  # one device: nothing is sharded
    _run(config.run)
    _model(config.model)
    _adapter(config.adapter)
    _optimizer(config.optimizer)
    _data(config.data)
    _eval(config.eval)
    if args["runlocal"]:
        _shrink(config)
    return config.lock()


def _run(run: ml_collections.ConfigDict) -> None:
    """What to compare, and for how long."""
    run.name = "quickstart"
    run.seed = 0
    run.methods = ("lora", "full")  # in order; LoRA is compared with "full"
    run.plugins = ()  # modules that register methods of your own
    run.wandb = ""  # a Weights & Biases project that also gets the metrics; "": none
    run.steps = 90
    run.log_every = 10
    run.cache_dir = ""  # "" for $XDG_CACHE_HOME/lorax, else ~/.cache/lorax


def _model(model: ml_collections.ConfigDict) -> None:
    """The base, and how it is pretrained."""
    model.vocabulary = 256  # bytes
    model.layers = 2
    model.width = 256
    model.heads = 4  # of size 64: on a CPU, attention costs more with more heads
    model.hidden = 768
    pretrain = model.pretrain = ml_collections.ConfigDict()
    pretrain.name = "muon"  # learns more than AdamW in so few steps
    pretrain.steps = 350
    pretrain.batch_size = 16
    pretrain.learning_rate = 2e-2
    pretrain.adam_learning_rate = 4e-3  # embedding, head, norms
    pretrain.warmup_steps = 50
    pretrain.final_share = 0.05
    pretrain.b1 = 0.9
    pretrain.b2 = 0.98
    pretrain.weight_decay = 0.1
    pretrain.clip_norm = 1.0


def _adapter(adapter: ml_collections.ConfigDict) -> None:
    """What trains under "lora"."""
    adapter.patterns = ("all-linear", "head/kernel")
    adapter.rank = 8
    adapter.alpha = 16.0
    adapter.adapter = "lora"  # any of lorax.adapters.REGISTRY
    adapter.scaling = "standard"
    adapter.init = "standard"  # any of lorax.inits.REGISTRY
    adapter.options = ()  # of init and adapter, such as (("gamma", 64.0),)
    adapter.calibration_batches = 8  # for inits that read data
    adapter.dropout = 0.0
    adapter.train_whole = (".*norm.*/scale",)  # 0.1 % of the leaves


def _optimizer(optimizer: ml_collections.ConfigDict) -> None:
    """AdamW with warm-up and cosine decay, at tuned rates."""
    optimizer.name = "adamw"  # any of trainer.optimizers.READY, or "chain"
    optimizer.options = ()  # for that optimiser, such as (("ratio", 16.0),)
    optimizer.chain = ()  # links (name, arguments), for "chain"
    optimizer.wrap = ()  # around it, such as (("accumulate", 4),)
    optimizer.learning_rate = ml_collections.ConfigDict()
    optimizer.learning_rate.lora = 1e-2
    optimizer.learning_rate.full = 2e-3
    optimizer.warmup_steps = 10
    optimizer.final_share = 0.05
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 1.0
    optimizer.tuned = (
        "Tuned to a factor of 2 at this config's rank and steps, on other held-out "
        "documents: `lorax tune`."
    )


def _data(data: ml_collections.ConfigDict) -> None:
    """Windows of the manual."""
    data.length = 128  # bytes of a window
    data.batch_size = 16


def _eval(held_out: ml_collections.ConfigDict) -> None:
    """What to evaluate, and which prompt to continue."""
    held_out.every = 30
    held_out.batch_size = 32
    held_out.source_bytes = 32_768  # of held-out source, to see what is forgotten
    held_out.prompt = 'The "with" statement'
    held_out.sample_bytes = 240
    held_out.temperature = 0.5


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Shrinks the run to a smoke test."""
    config.run.steps = config.model.pretrain.steps = 4
    config.run.log_every = config.eval.every = 2
    config.model.layers, config.model.width, config.model.heads = 2, 32, 1
    config.model.hidden = 64
    config.data.length, config.data.batch_size = 32, 4
    config.model.pretrain.batch_size = 4
    config.eval.source_bytes = 2_048
    config.eval.sample_bytes = 8
