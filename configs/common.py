"""What the configs share: their sections, in one order, and the argument language.

A config is values only, in flat sections `run, distributed, model, adapter, optimizer,
population, data, sharding, eval`; code that turns values into objects lives in
`experiments/trainer/objects.py`.
"""

import ml_collections
from ml_collections import config_dict

SECTIONS = (
    "run",
    "distributed",
    "model",
    "adapter",
    "optimizer",
    "population",
    "data",
    "sharding",
    "eval",
)
POPULATION = ("seed", "learning_rate", "rank", "alpha")
"""What members of a population may differ in: zipped tuples, `()` for the config's own.

All empty, there is no population.
"""


def sections() -> ml_collections.ConfigDict:
    """Returns a config of empty sections, in the house's order, and no population."""
    config = ml_collections.ConfigDict()
    for name in SECTIONS:
        config[name] = ml_collections.ConfigDict()
    for name in POPULATION:
        config.population[name] = ()
    return config


def checkpoint_run() -> ml_collections.ConfigDict:
    """Returns what most runs of `experiments.recipes.finetune` have in common.

    A config sets its own name, source, patterns, learning rate, sizes and task.
    """
    config = sections()
    config.run.seed = 0
    config.run.methods = ("lora",)  # or ("full",)
    config.run.plugins = ()  # modules that register methods of your own
    config.run.steps = 1_000
    config.run.log_every = 100
    config.run.label_smoothing = 0.0
    config.run.skip_nonfinite = 3  # steps in a row; then the run stops
    config.run.save_every = 0  # steps; 0: no checkpoints, a stop ends the run
    config.run.save_keep = 3  # of the newest, so that two may be damaged
    config.run.save_deadline = 25.0  # seconds between SIGTERM and giving up

    # Several processes. What is not set comes from the environment.
    config.distributed.coordinator = ""  # host:port of process 0
    config.distributed.processes = config_dict.placeholder(int)
    config.distributed.process = config_dict.placeholder(int)
    config.distributed.heartbeat = 30  # seconds until a silent process counts as dead

    config.model.source = ""  # a directory, or a hub id
    config.model.random = ml_collections.ConfigDict()  # a config.json: drawn, no result
    config.model.published = ml_collections.ConfigDict()  # of the source, for a plan
    config.model.labels = 0  # of a classification head; 0: none
    config.model.dtype = ""  # of the computation; "" for the checkpoint's
    config.model.remat = "none"
    config.model.attention = "plain"  # "flash": the Llama family on TPUs

    config.adapter.patterns = ("all-linear",)
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.adapter.adapter = "lora"
    config.adapter.scaling = "standard"
    config.adapter.init = "standard"
    config.adapter.options = ()
    config.adapter.calibration_batches = 8
    config.adapter.redistribute = 1.0  # init "eva": x its rank that a kernel may get
    config.adapter.dropout = 0.0
    config.adapter.train_whole = ()

    config.optimizer.name = "adamw"
    config.optimizer.options = ()
    config.optimizer.chain = ()
    config.optimizer.wrap = ()
    config.optimizer.learning_rate = ml_collections.ConfigDict()
    config.optimizer.learning_rate.lora = 2e-4
    config.optimizer.learning_rate.full = 1e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.final_share = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0

    config.data.task = ""  # one of experiments.tasks.TASKS
    config.data.train_rows = 0  # 0: all
    config.data.valid_rows = 0  # 0: all
    config.data.lengths = (128,)  # of the buckets, in tokens
    config.data.packed = False  # several examples in a row of the longest length
    config.data.batch_size = 16

    # The mesh. All 1: one device, and nothing is sharded. -1: what the others leave.
    config.sharding.data = 1  # copies of the model
    config.sharding.fsdp = 1  # slices of leaves, gathered where they are used
    config.sharding.tensor = 1  # slices of heads, hidden units and vocabulary
    config.sharding.rules = ()  # (regex of paths, mesh axes by dimension), first wins
    config.sharding.may_replicate = ()  # logical axes left whole if indivisible
    config.sharding.replicate_adapters = False  # else they lie as their kernels
    config.sharding.topology = ""  # for a plan: v5e:4x4, v5p-128, cpu:8

    config.eval.every = 500
    config.eval.rows = 600  # of the validation set, while training; 0: all
    config.eval.final_rows = 0  # of it, at the end; 0: all
    config.eval.batch_size = 32
    config.eval.test = 0  # prompts of the test set to write for, once; 0: none
    return config


def shrink(config: ml_collections.ConfigDict, fields: dict) -> None:
    """Makes a run a path check: 20 steps of a drawn model on movie reviews.

    Args:
      config: of a labelled task.
      fields: the config.json of the model to draw.
    """
    config.run.steps, config.run.log_every = 20, 5
    config.model.random = ml_collections.ConfigDict(fields)
    config.model.labels = 2 if config.model.labels else 0
    config.optimizer.learning_rate.lora = 5e-3
    config.optimizer.warmup_steps = 2
    config.data.name = "sentence_polarity"
    config.data.train_rows = config.data.valid_rows = 512
    config.data.lengths = (160,)
    config.data.batch_size = 8
    config.eval.rows, config.eval.every = 64, 10


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> dict:
    """Reads what follows the colon of `--config=configs/x.py:runlocal,seed=3`.

    Args:
      arg: comma-separated `name=value`; a bare `name` is `name=True`. None or "" for
        the defaults.
      **defaults: the arguments the config knows, each with its default, whose type the
        value is read as.

    Returns:
      The defaults, overridden by `arg`.

    Raises:
      ValueError: a name the config does not know, or a value of another type.

    Example:
      >>> parse_arg("runlocal,rank=4", runlocal=False, rank=8)
      {'runlocal': True, 'rank': 4}
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            raise ValueError(
                f"{name!r} is no argument of this config; it knows "
                f"{', '.join(defaults) or 'none'}"
            )
        kind = type(defaults[name])
        if kind is bool:
            text = (text if equals else "true").lower()
            if text not in ("true", "false", "1", "0"):
                raise ValueError(f"{item!r}: give true or false")
            values[name] = text in ("true", "1")
        else:
            try:
                values[name] = kind(text)
            except ValueError:
                raise ValueError(
                    f"{item!r}: give a value of type {kind.__name__}"
                ) from None
    return values
