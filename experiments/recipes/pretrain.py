"""The base model: trained once on the standard library's source, then cached.

The cache's key is a hash of everything the base depends on: the model and pretraining
values of the config, the text itself and the version of this code. The file is renamed
into place atomically, so a killed run, or two at once, never leave half a file.
"""

import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import flax.traverse_util
import jax
import ml_collections
import numpy as np
import rich.progress
import safetensors
import safetensors.numpy
from absl import logging

from experiments.data import windows
from experiments.data.sources import documents
from experiments.generation import decoder
from experiments.machine import disk
from experiments.trainer import metric_log, nonfinite, objects, optimizers, prepare
from experiments.trainer.fit import Output, Schedule, fit

# Bumped when the model or the pretraining code changes what it computes.
VERSION = 1


def load_or_train(
    config: ml_collections.ConfigDict,
    model: decoder.Decoder,
    bars: rich.progress.Progress,
    metrics_writer: metric_log.Writer,
) -> Any:
    """Returns the base's parameters, from the cache if it has them.

    Args:
      config: the whole config.
      model: as `config.model` describes it.
      bars: where the progress bar goes.
      metrics_writer: where metrics go, as run `pretrain`.
    """
    path = (
        cache_dir(config.run.cache_dir) / f"base-{fingerprint(config)[:16]}.safetensors"
    )
    example = np.zeros((1, config.data.length), np.int32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    if path.exists():
        try:
            params = _load(path, abstract)
            logging.info("base model read from %s", path)
            return params
        except (safetensors.SafetensorError, ValueError, OSError) as e:
            logging.warning("%s cannot be read (%s): training the base again", path, e)
    path.parent.mkdir(parents=True, exist_ok=True)  # fails before the work, not after
    guard = nonfinite.Guard(path.parent, nonfinite.LIMIT)
    params = _train(config, model, example, bars, metrics_writer, guard)
    _save(path, params)
    return params


def fingerprint(config: ml_collections.ConfigDict) -> str:
    """Returns a hash of what determines the base: config, text and code versions."""
    values = {
        "versions": [VERSION, documents.VERSION],
        "seed": config.run.seed,
        "model": config.model.to_dict(),
        "length": config.data.length,
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for text in (documents.raw_source(), documents.raw_topics()):
        digest.update(windows.stream(text).data)
    return digest.hexdigest()


def cache_dir(configured: str) -> pathlib.Path:
    """Returns `configured`, or `lorax` in the user's cache directory (XDG)."""
    if configured:
        return pathlib.Path(configured).expanduser()
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(user).expanduser() / "lorax"


def _train(
    config: ml_collections.ConfigDict,
    model: decoder.Decoder,
    example: np.ndarray,
    bars: rich.progress.Progress,
    metrics_writer: metric_log.Writer,
    guard: nonfinite.Guard,
) -> Any:
    """Trains every leaf from a random initialisation."""
    init_key, fit_key = jax.random.split(jax.random.key(config.run.seed))
    params = jax.jit(model.init)(init_key, example)["params"]
    hp = config.model.pretrain
    batches = windows.training_batches(
        documents.source_train(), hp.batch_size, config.data.length, config.run.seed
    )
    problem = prepare.Problem(
        objects.make_loss(model),
        params,
        objects.make_targets("full", config.adapter),
        optimizers.make_optimizer(hp.learning_rate, hp.steps, hp),
        batches,
    )
    prepared = prepare.prepare(fit_key, problem, clip_norm=hp.clip_norm)
    schedule = Schedule(hp.steps, config.run.log_every)
    output = Output("pretrain", bars, metrics_writer)
    return fit(prepared, batches, schedule, output, guard=guard).merged()


def _save(path: pathlib.Path, params: Any) -> None:
    """Writes the parameters beside `path`, then renames them into place."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(params), sep="/")
    with disk.failing(path):
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with open(handle, "wb") as file:
                file.write(safetensors.numpy.save(flat))
            os.replace(partial, path)
        except BaseException:
            pathlib.Path(partial).unlink(missing_ok=True)
            raise


def _load(path: pathlib.Path, abstract: Any) -> Any:
    """Reads parameters; ValueError if their shapes are not those of `abstract`."""
    flat = safetensors.numpy.load_file(path)
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    described = jax.tree.map(lambda x: (x.shape, str(x.dtype)), params)
    if described != jax.tree.map(lambda x: (x.shape, str(x.dtype)), abstract):
        raise ValueError("its leaves are not those of the model")
    return jax.device_put(params)
