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
    """How long, and what is kept."""
    run.seed = 0
    run.methods = ("lora",)  # or ("full",)
    run.plugins = ()  # modules that register methods of your own
    run.wandb = ""  # a project of Weights & Biases, to which metrics are sent too
    run.steps = 1_000
    run.log_every = 100
    run.label_smoothing = 0.0
    run.loss = ""  # the task's own; else "distillation", or of preferences
    #   "dpo" (their own), "ipo", "orpo", "simpo", "kto"
    run.loss_options = ()  # of that loss, such as (("beta", 0.1),)
    run.loss_chunk = -1  # positions whose logits are made at a time; 0: all; -1: auto
    run.router_loss = 0.0  # x a mixture's balance loss; -1: by the model's config.json
    run.router_z_loss = 0.0  # x that of its routers' logits; ST-MoE has 0.001
    run.skip_nonfinite = 3  # steps in a row; then the run stops
    run.save_every = 0  # steps; 0: no checkpoints, a stop ends the run
    run.save_keep = 3  # of the newest, so that two may be damaged
    run.save_deadline = 25.0  # seconds between SIGTERM and giving up


def _processes(distributed: ml_collections.ConfigDict) -> None:
    """Several of them; what is not set comes from the environment."""
    distributed.coordinator = ""  # host:port of process 0
    distributed.processes = config_dict.placeholder(int)
    distributed.process = config_dict.placeholder(int)
    distributed.heartbeat = 30  # seconds until a silent process counts as dead


def _model(model: ml_collections.ConfigDict) -> None:
    """Which checkpoint, and how it computes."""
    model.source = ""  # a directory, a GGUF file, or a hub id
    model.random = ml_collections.ConfigDict()  # a config.json: drawn, no result
    model.published = ml_collections.ConfigDict()  # of the source, for a plan
    model.teacher = ""  # as source, of run.loss = "distillation"
    model.quantize = ""  # "nf4", or pattern=format,...: a base in a few bits a weight
    model.labels = 0  # of a classification head; 0: none
    model.head = ""  # of an encoder: "none" for hidden states; "" the checkpoint's
    model.dtype = ""  # of the computation; "" for the checkpoint's
    model.scan = True  # a loop over the layers; False compiles longer: faster on GPUs
    model.remat = "none"  # or "full", "dots", "save=q,k,v; offload=input"
    model.attention = "plain"  # "flash": in linear memory, of the Llama family
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
    adapter.redistribute = 1.0  # init "eva": x its rank that a kernel may get
    adapter.dropout = 0.0
    adapter.train_whole = ()


def _optimizer(optimizer: ml_collections.ConfigDict) -> None:
    """AdamW behind a warm-up and a cosine."""
    optimizer.name = "adamw"
    optimizer.options = ()
    optimizer.chain = ()
    optimizer.wrap = ()
    optimizer.rates = ()  # of some paths, such as (("classifier_.*", 3e-3),)
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
    """Which task, in batches of which size."""
    data.task = ""  # one of experiments.tasks.TASKS
    data.train = ""  # a table below the folder of data sets, or a path
    data.valid = ""  # likewise; of task "instructions" "": the last tenth of train
    data.pooling = ""  # of task "pairs": "mean", "cls", ...; "" as modules.json says
    data.scale = 20.0  # of its cosines
    data.train_rows = 0  # 0: all
    data.valid_rows = 0  # 0: all
    data.lengths = (128,)  # of the buckets, in tokens
    data.packed = False  # several examples in a row of the longest length
    data.batch_size = 16


def _mesh(sharding: ml_collections.ConfigDict) -> None:
    """All 1: one device, and nothing is sharded. -1: what the others leave."""
    sharding.data = 1  # copies of the model
    sharding.fsdp = 1  # slices of leaves, gathered where they are used
    sharding.expert = 1  # experts of a layer, and rows; of mixtures
    sharding.context = 1  # stretches of rows; with model.attention = "flash"
    sharding.tensor = 1  # slices of heads, hidden units and vocabulary
    sharding.rules = ()  # (regex of paths, mesh axes by dimension), first wins
    sharding.may_replicate = ()  # logical axes left whole if indivisible
    sharding.adapters = "auto"  # or as their "kernels", cut along "all" axes, "whole"
    sharding.topology = ""  # for a plan: v5e:4x4, v5p-128, cpu:8


def _eval(held_out: ml_collections.ConfigDict) -> None:
    """What is judged, and how often."""
    held_out.every = 500
    held_out.rows = 600  # of the validation set, while training; 0: all
    held_out.final_rows = 0  # of it, at the end; 0: all
    held_out.batch_size = 32
    held_out.test = 0  # prompts of the test set to write for, once; 0: none


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
    """Reads what follows the colon of `--config=x:runlocal,seed=3`.

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
