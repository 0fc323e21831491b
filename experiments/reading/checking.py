"""Checks a config as a whole as soon as it is read, before any loading or training.

`fields` says what each single value may be. This module checks names that other tables
hold (optimisers, inits and tasks, to which plugins may add) and fields that must agree
with each other. The optimiser, its chain and the targets are built once, so that they
check their own arguments.
"""

from __future__ import annotations

from collections.abc import Iterable

import ml_collections

from experiments import tasks
from experiments.data import tokenization
from experiments.data.sources import e2e, glue
from experiments.generation import loading, quantizing
from experiments.reading import fields, plugins
from experiments.tasks import distillation, prefer
from experiments.trainer import objects, optimizers
from lorax import attention, inits
from lorax.models import remat


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, naming the field, for a config that no run could finish."""
    fields.require(config)
    plugins.load(config)
    for method in config.run.methods:
        _targets(config, method)
        _optimizer(config.optimizer, "optimizer", config.run.steps, method)
    if "source" in config.model:
        _checkpoint_run(config)
    else:
        _byte_model(config.model)
        hp = config.model.pretrain
        _optimizer(hp, "model.pretrain", hp.steps)


def check_runs(runs: Iterable[tuple[str, ml_collections.ConfigDict]]) -> None:
    """Raises ValueError, naming the run, for the first one that could not finish.

    Args:
      runs: for each run, what distinguishes it from the others, and its config.
    """
    for told, config in runs:
        try:
            check(config)
        except ValueError as error:
            raise ValueError(f"the run {told}: {error}") from None


def _targets(config: ml_collections.ConfigDict, method: str) -> None:
    """Builds the targets of a method, which check themselves."""
    if method == "lora" and not config.adapter.patterns:
        raise ValueError(
            "config.adapter.patterns=(): give at least one pattern, such as "
            "('all-linear',)"
        )
    rho, init = config.adapter.get("redistribute", 1.0), config.adapter.init
    if rho > 1 and init != "eva":
        raise ValueError(
            f"config.adapter.redistribute={rho}: only init='eva' measures which kernels"
            f" need more rank, and the init is {init!r}; give 1.0, or init='eva'"
        )
    try:
        for target in objects.make_targets(method, config.adapter):
            inits.check(target)
    except ValueError as error:
        raise ValueError(f"config.adapter: {error}") from None


def _optimizer(
    config: ml_collections.ConfigDict, name: str, steps: int, method: str = ""
) -> None:
    """Builds an optimiser, which checks its arguments."""
    rate = config.learning_rate[method] if method else config.learning_rate
    try:
        optimizers.make_optimizer(rate, steps, config)
    except TypeError as error:  # an argument that the method does not have
        raise ValueError(f"config.{name}: {error}") from None
    except ValueError as error:
        told = str(error)
        raise ValueError(
            f"config.{told}" if told.startswith(name) else f"config.{name}: {told}"
        ) from None


def _byte_model(config: ml_collections.ConfigDict) -> None:
    """Checks that heads split the width into even sizes, as rotary embeddings need."""
    if config.width % (2 * config.heads):
        raise ValueError(
            f"config.model.width={config.width} and config.model.heads={config.heads}: "
            "the width must be a multiple of twice the heads, because each head's size "
            "must be even"
        )
    if config.vocabulary < 256:
        raise ValueError(
            f"config.model.vocabulary={config.vocabulary}: the model reads bytes; give "
            "a whole number >= 256"
        )


def _quantized(config: ml_collections.ConfigDict) -> None:
    """Checks the format of a quantised base, and that what trains fits it."""
    text, (method,) = config.model.quantize, config.run.methods
    try:
        quantizing.rules(text)
    except ValueError as error:
        raise ValueError(f"config.model.quantize={error}") from None
    if text and method == "full":
        raise ValueError(
            f"config.model.quantize={text!r} and run.methods=('full',): a quantised "
            "base does not train; give ('lora',), or leave quantize empty"
        )
    if text != quantizing.OF_FILE:
        return
    if not tokenization.is_gguf(config.model.source) or config.model.random:
        raise ValueError(
            "config.model.quantize='file' keeps the codes of a GGUF file, and "
            f"config.model.source={config.model.source!r} is not one; give a format "
            "such as 'nf4'"
        )
    targets = objects.make_targets(method, config.adapter)
    if not all(inits.of_target(target).keeps_base for target in targets):
        raise ValueError(
            "config.model.quantize='file' keeps the codes of the file, but "
            f"config.adapter.init={config.adapter.init!r} moves a part of each kernel "
            "into the adapter; give a format such as 'nf4', which quantises the rest"
        )


def _shared_rows(config: ml_collections.ConfigDict) -> None:
    """Checks what devices need in order to share the rows of a batch."""
    context, own = config.sharding.get("context", 1), config.model.attention
    if context == 1:
        return
    if own not in attention.STRIPED:
        raise ValueError(
            f"config.sharding.context={context} and config.model.attention="
            f"{own!r}: devices that share rows compute attention in a ring; give "
            "'flash'"
        )
    for length in config.data.lengths:
        if length % context**2:
            raise ValueError(
                f"config.data.lengths: {length} tokens are not a multiple of "
                f"sharding.context={context} squared, which sharing rows in stripes "
                "needs"
            )


def _loss(config: ml_collections.ConfigDict) -> None:
    """Checks that the task offers the loss, and the loss its options."""
    run, task, teacher = config.run, config.data.task, config.model.teacher
    own = {"preferences": tuple(prefer.METHODS)}
    own |= dict.fromkeys(("e2e", "instructions"), (distillation.NAME,))
    known = own.get(task, ())
    if run.loss not in ("", *known):
        raise ValueError(
            f"config.run.loss={run.loss!r}: give '' for the default loss of the task "
            f"{task!r}" + "".join(f", or {name!r}" for name in known)
        )
    if bool(teacher) != (run.loss == distillation.NAME):
        raise ValueError(
            f"config.model.teacher={teacher!r} and config.run.loss={run.loss!r}: "
            f"{distillation.NAME!r} needs a teacher, and no other loss uses one"
        )
    if teacher:
        try:
            loading.check(teacher)
        except FileNotFoundError as error:
            raise ValueError(f"config.model.teacher: {error}") from None
    if not run.loss and task != "preferences":
        if run.loss_options:
            raise ValueError(
                f"config.run.loss_options={run.loss_options!r}: the default loss of "
                f"the task {task!r} has no options; give ()"
            )
        return
    if run.label_smoothing:
        raise ValueError(
            f"config.run.label_smoothing={run.label_smoothing}: it applies only to the "
            "next-token loss; give 0.0. DPO's own label smoothing is one of "
            "config.run.loss_options"
        )
    if run.router_loss or run.router_z_loss:
        raise ValueError(
            f"config.run.router_loss={run.router_loss}, router_z_loss="
            f"{run.router_z_loss}: they are added only to the next-token loss; give 0.0"
        )
    make = distillation if run.loss == distillation.NAME else prefer
    try:
        make.loss_of(run)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.run.loss_options: {error}") from None


def _checkpoint_run(config: ml_collections.ConfigDict) -> None:
    """Checks what `experiments.recipes.finetune` needs beyond valid fields."""
    if len(config.run.methods) != 1:
        raise ValueError(
            f"config.run.methods={config.run.methods!r}: a run from a checkpoint "
            "trains by one method; give ('lora',) or ('full',)"
        )
    if not config.model.source and not config.model.random:
        raise ValueError(
            "config.model.source='': give a directory or a hub id, or a config.json in "
            "config.model.random"
        )
    if not config.model.random:
        try:
            loading.check(config.model.source)
        except FileNotFoundError as error:
            raise ValueError(f"config.model.source: {error}") from None
    _quantized(config)
    try:
        remat.parse(config.model.remat)
    except ValueError as error:
        raise ValueError(f"config.model.{error}") from None
    data = config.data
    if data.task not in tasks.TASKS:
        raise ValueError(
            f"config.data.task={data.task!r}: give one of {', '.join(tasks.TASKS)}"
        )
    if data.task == "e2e" and data.form not in e2e.TOKENIZE:
        raise ValueError(
            f"config.data.form={data.form!r}: give one of {', '.join(e2e.TOKENIZE)}"
        )
    if data.task == "classification" and data.name in glue.TASKS and not data.root:
        raise ValueError("config.data.root='': give the folder of the GLUE tasks")
    _shared_rows(config)
    _loss(config)
    whole = "classification", "images", "pairs", "preferences", "text_to_text"
    if data.packed and data.task in whole:
        raise ValueError(
            f"config.data.packed=True: the task {data.task!r} does not pack examples; "
            "set it to False"
        )
