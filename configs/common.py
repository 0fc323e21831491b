"""What the configs share: their sections, in a fixed order, and how arguments are read.

A config holds only values, in flat sections `run, distributed, model, adapter,
optimizer, population, data, sharding, eval`; the code that turns values into objects is
in `experiments/trainer/objects.py`.
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

A run trains a population if at least one of them is not empty.
"""


def sections() -> ml_collections.ConfigDict:
    """Returns a config of empty sections, in the usual order, and no population."""
    config = ml_collections.ConfigDict()
    for name in SECTIONS:
        config[name] = ml_collections.ConfigDict()
    for name in POPULATION:
        config.population[name] = ()
    return config


def checkpoint_run() -> ml_collections.ConfigDict:
    """Returns what most configs for `experiments.recipes.finetune` have in common.

    Each config then sets its own name, source, patterns, learning rate, sizes and task.
    """
    config = sections()
    _run(config.run)
    _processes(config.distributed)
    _model(config.model)
    _adapter(config.adapter)
    _optimizer(config.optimizer)
    _data(config.data)
    _mesh(config.sharding)
    _eval(config.eval)
    return config


def _run(run: ml_collections.ConfigDict) -> None:
    """How long to train, and what to save."""
    run.seed = 0
    run.methods = ("lora",)  # or ("full",)
    run.plugins = ()  # modules that register methods of your own
    run.wandb = ""  # a Weights & Biases project that also gets the metrics; "": none
    run.steps = 1_000
    run.log_every = 100
    run.label_smoothing = 0.0
    run.loss = ""  # "" for the task's default; else "distillation", or for preferences
    #   "dpo" (their default), "ipo", "orpo", "simpo", "kto"
    run.loss_options = ()  # for that loss, such as (("beta", 0.1),)
    run.loss_chunk = -1  # positions whose logits are computed at once; 0: all; -1: auto
    run.router_loss = 0.0  # weight of a mixture's balance loss; -1: from config.json
    run.router_z_loss = 0.0  # weight of its router z-loss; ST-MoE uses 0.001
    run.skip_nonfinite = 3  # steps in a row to skip before the run stops
    run.save_every = 0  # steps; 0: no checkpoints, and a stopped run cannot resume
    run.save_keep = 3  # checkpoints kept, the newest, so that two may be damaged
    run.save_deadline = 25.0  # seconds after SIGTERM in which the last save must finish


def _processes(distributed: ml_collections.ConfigDict) -> None:
    """Several processes; what is not set comes from the environment."""
    distributed.coordinator = ""  # host:port of process 0
    distributed.processes = config_dict.placeholder(int)
    distributed.process = config_dict.placeholder(int)
    distributed.heartbeat = 30  # seconds until a silent process counts as dead


def _model(model: ml_collections.ConfigDict) -> None:
    """Which checkpoint to load, and how it computes."""
    model.source = ""  # a directory, a GGUF file, or a hub id
    model.random = ml_collections.ConfigDict()  # a config.json: random weights, to test
    model.published = ml_collections.ConfigDict()  # config.json of the source, to plan
    model.teacher = ""  # for run.loss = "distillation"; given as source is
    model.quantize = ""  # "nf4", or pattern=format,...: the base in a few bits a weight
    model.labels = 0  # classes of a new classification head; 0: none
    model.head = ""  # of an encoder; "none": hidden states; "": the checkpoint's
    model.dtype = ""  # of the computation; "" for the checkpoint's
    model.scan = True  # loop over layers; False: slower to compile, faster on GPUs
    model.remat = "none"  # or "full", "dots", "save=q,k,v; offload=input"
    model.attention = "plain"  # "flash": linear memory, for the Llama family
    model.dispatch = ""  # "dense": every expert of a mixture on every token


def _adapter(adapter: ml_collections.ConfigDict) -> None:
    """What trains."""
    adapter.patterns = ("all-linear",)
    adapter.rank = 8
    adapter.alpha = 16.0
    adapter.adapter = "lora"
    adapter.scaling = "standard"
    adapter.init = "standard"
    adapter.options = ()
    adapter.calibration_batches = 8
    adapter.redistribute = 1.0  # init "eva": multiple of its rank that a kernel may get
    adapter.dropout = 0.0
    adapter.train_whole = ()


def _optimizer(optimizer: ml_collections.ConfigDict) -> None:
    """AdamW with warm-up and cosine decay."""
    optimizer.name = "adamw"
    optimizer.options = ()
    optimizer.chain = ()
    optimizer.wrap = ()
    optimizer.rates = ()  # peaks of their own by path, as (("classifier_.*", 3e-3),)
    optimizer.learning_rate = ml_collections.ConfigDict()
    optimizer.learning_rate.lora = 2e-4
    optimizer.learning_rate.full = 1e-5
    optimizer.warmup_steps = 100
    optimizer.final_share = 0.0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 1.0


def _data(data: ml_collections.ConfigDict) -> None:
    """Which task, and batches of which size."""
    data.task = ""  # one of experiments.tasks.TASKS
    data.train = ""  # a table below the folder of data sets, or a path
    data.valid = ""  # likewise; task "instructions": "" is the last tenth of train
    data.pooling = ""  # task "pairs": "mean", "cls", ...; "": as modules.json says
    data.scale = 20.0  # task "pairs": multiplies the cosines
    data.train_rows = 0  # 0: all
    data.valid_rows = 0  # 0: all
    data.lengths = (128,)  # of the buckets, in tokens
    data.packed = False  # several examples in a row of the longest length
    data.batch_size = 16


def _mesh(sharding: ml_collections.ConfigDict) -> None:
    """All 1: one device, nothing sharded. -1: the devices that the others leave."""
    sharding.data = 1  # copies of the model
    sharding.fsdp = 1  # slices of leaves, gathered where they are used
    sharding.expert = 1  # for mixtures: slices of a layer's experts, and of rows
    sharding.context = 1  # stripes of each row; needs model.attention = "flash"
    sharding.tensor = 1  # slices of heads, hidden units and vocabulary
    sharding.rules = ()  # (regex of paths, mesh axes by dimension), first wins
    sharding.may_replicate = ()  # logical axes left whole if indivisible
    sharding.adapters = "auto"  # or as "kernels" are, along "all" axes, or "whole"
    sharding.topology = ""  # for a plan: v5e:4x4, v5p-128, cpu:8


def _eval(held_out: ml_collections.ConfigDict) -> None:
    """What to evaluate, and how often."""
    held_out.every = 500
    held_out.rows = 600  # validation rows during training; 0: all
    held_out.final_rows = 0  # validation rows at the end; 0: all
    held_out.batch_size = 32
    held_out.test = 0  # test prompts to generate for, once at the end; 0: none


def shrink(config: ml_collections.ConfigDict, fields: dict) -> None:
    """Makes a run a smoke test: 20 steps of a tiny random model on movie reviews.

    Args:
      config: the config of a labelled task.
      fields: the config.json of the tiny model.
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
    """Reads what follows the colon in `--config=x:runlocal,seed=3`.

    Args:
      arg: comma-separated `name=value`; a bare `name` is `name=True`. None or "" for
        the defaults.
      **defaults: the arguments the config knows, with their defaults; values are
        converted to the type of the default.

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
                f"{name!r} is not an argument of this config; it knows "
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
