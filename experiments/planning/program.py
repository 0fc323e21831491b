"""The real train step of a config, traced with only shapes and their shardings.

It is built as for a run: the task's loss, `lorax.init`, the config's optimiser,
`lorax.training.make_train_step`. No array is ever allocated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import logging

import lorax
from experiments.generation import loading, quantizing, unmerged
from experiments.machine import placement
from experiments.tasks import losses
from experiments.trainer import objects, optimizers
from lorax import inits, sharding, training
from lorax.interop import hf

FORMS = ("adapt", "merge")


class Program(NamedTuple):
    """A step and an evaluation that can be traced, and their arguments.

    Attributes:
      step: `(state, params, batch) -> (state, metrics)`, jitted.
      state: abstract, with shardings.
      params: likewise.
      batch: likewise.
      scores: `(Unmerged, batch) -> metrics`, jitted: a run's evaluation between steps.
      held_out: a batch to evaluate.
      placed: where the parameters are placed, and why.
      tokens: in a batch.
    """

    step: Any
    state: training.TrainState
    params: Any
    batch: dict[str, Any]
    scores: Any
    held_out: dict[str, Any]
    placed: sharding.Placed
    tokens: int

    def trace(self) -> Any:
        """Returns the traced step."""
        with jax.set_mesh(self.placed.mesh):
            return self.step.trace(self.state, self.params, self.batch)

    def trace_evaluation(self) -> Any:
        """Returns the traced evaluation."""
        model = unmerged.Unmerged(self.state.adapters, self.params)
        with jax.set_mesh(self.placed.mesh):
            return self.scores.trace(model, self.held_out)


def make_mesh(config: ml_collections.ConfigDict, devices: Any) -> Any:
    """Returns the mesh of `config.sharding` over these devices."""
    sizes = {axis: config.get(axis, 1) for axis in sharding.AXES}
    return sharding.make_mesh(**sizes, devices=devices)


def build(
    config: ml_collections.ConfigDict,
    devices: Any,
    form: str = "adapt",
) -> Program:
    """Makes the train step of a config for these devices.

    Args:
      config: of a run with a response task; `config.model.published` or
        `config.model.random` has the fields of its config.json.
      devices: of the topology.
      form: "adapt": the step that trains; "merge": one whose loss reads merged kernels,
        to see what materialising adapters costs.

    Raises:
      ValueError: a mesh that does not divide the devices, the batch or an axis of a
        leaf, or a loss that plans do not support.
    """
    if config.run.get("loss"):
        raise ValueError(
            f"config.run.loss={config.run.loss!r}: plans only support the next-token "
            "loss; give '' and a response task, such as 'instructions'"
        )
    mesh = make_mesh(config.sharding, devices)
    model = make_model(config.model)
    shapes = hf.abstract(model)
    placed = placement.place_params(mesh, config.sharding, model, shapes)
    batch, held_out = (make_batch(config, part, mesh) for part in ("data", "eval"))
    run = config.run
    routers = losses.Routers(run.router_loss, run.router_z_loss)
    how = run.label_smoothing, run.loss_chunk, routers
    loss_fn = losses.make_causal(model, *how)
    state, params, tx = make_state(config, loss_fn, shapes, batch)
    where = sharding.state_shardings(state, placed, config.sharding.adapters)
    made = make_step(loss_fn, tx, config.optimizer.clip_norm, form)
    step = jax.jit(
        made, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh))
    )
    return Program(
        step,
        jax.tree.map(_abstract, state, where),
        jax.tree.map(
            _abstract, params, sharding.base_shardings(params, state.adapters, placed)
        ),
        batch,
        jax.jit(unmerged.either(lambda params, batch: loss_fn(params, batch)[1])),
        held_out,
        placed,
        config.data.batch_size * max(config.data.lengths),
    )


def make_model(config: ml_collections.ConfigDict) -> Any:
    """Returns the model that a config.json describes, in one dtype, without weights."""
    if config.published:
        fields = config.published.to_dict()
    elif config.random:
        fields = config.random.to_dict()
    else:
        raise ValueError(
            "a plan needs the model's shapes: give the fields of the checkpoint's "
            "config.json as config.model.published"
        )
    dtype = jnp.dtype(config.dtype or "float32")
    switches = loading.switches_of(config) | {"dtype": dtype, "param_dtype": dtype}
    return hf.configured(fields, "config.model.published", **switches)


def make_batch(
    config: ml_collections.ConfigDict, section: str, mesh: Any
) -> dict[str, Any]:
    """Returns the longest batch of `experiments.data.batches.next_token`, abstract.

    Args:
      config: of the run.
      section: the section with its `batch_size`, "data" or "eval".
      mesh: the mesh that it is sharded over.
    """
    rows, length = config[section].batch_size, max(config.data.lengths)
    where = sharding.batch_sharding(mesh)
    parts = sharding.row_parts(mesh.shape)
    if rows % parts:
        raise ValueError(
            f"{section}.batch_size={rows} is not a multiple of the {parts} devices of "
            "data x fsdp that share a batch; change it, or the mesh"
        )

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    return {
        "inputs": leaf((rows, length), jnp.int32),
        "targets": leaf((rows, length), jnp.int32),
        "weights": leaf((rows, length), jnp.float32),
        "bytes": leaf((rows,), jnp.int32),
    }


def make_state(
    config: ml_collections.ConfigDict,
    loss_fn: Any,
    shapes: Any,
    batch: Any,
) -> tuple[training.TrainState, Any, Any]:
    """Returns the abstract train state, its base, and its optimiser."""
    (method,) = config.run.methods
    kernels = lorax.discover(loss_fn, shapes, batch)
    targets = [
        # inits that read data start from factors of the same shapes; if the run moves
        # ranks between kernels (adapter.redistribute), with the same total rank
        dataclasses.replace(t, init="standard", options=())
        if inits.of_target(t).stats
        else t
        for t in objects.make_targets(method, config.adapter)
    ]
    logging.info("%s", lorax.describe(shapes, targets, kernels))
    tx = optimizers.make_optimizer(
        config.optimizer.learning_rate[method], config.run.steps, config.optimizer
    )

    if config.model.quantize == quantizing.OF_FILE:
        raise ValueError(
            "config.model.quantize='file': a plan does not read the file; give the "
            "format closest to its codes, such as 'int4'"
        )
    rules = quantizing.rules(config.model.quantize)

    def create(key: jax.Array, params: Any) -> tuple[training.TrainState, Any]:
        adapters, base = lorax.init(key, params, targets, kernels)
        if rules:
            base = lorax.quantize(base, rules, kernels)
        return training.create_state(key, adapters, tx), base

    return *jax.eval_shape(create, jax.random.key(0), shapes), tx


def make_step(
    loss_fn: Any, tx: Any, clip_norm: float | None, form: str
) -> Callable[..., Any]:
    """Returns the train step in one of its forms."""
    if form == "adapt":
        simple = training.simple_loss(loss_fn)
        return training.make_train_step(simple, tx, clip_norm=clip_norm)
    if form not in FORMS:
        raise ValueError(f"form={form!r}; choose one of {', '.join(FORMS)}")
    tx = optax.with_extra_args_support(tx)

    def loss(adapters: Any, params: Any, batch: Any) -> Any:
        return loss_fn(lorax.merge(adapters, params), batch)

    def step(state: Any, params: Any, batch: Any) -> Any:
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = value_and_grad(state.adapters, params, batch)
        norm = optax.tree.norm(grads)
        scale = 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.adapters, base=params
        )
        adapters = optax.apply_updates(state.adapters, updates)
        new = state.replace(adapters=adapters, opt_state=opt_state, step=state.step + 1)
        return new, {**metrics, "loss": value, "grad_norm": norm}

    return step


def spelled_out(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the same run with plain attention on one device, to count operations.

    The work in a Pallas kernel's grid cannot be counted, nor how much of a ring's work
    each device does.
    """
    other = config.copy_and_resolve_references()  # ConfigDict(config) shares sections
    other.model.attention = "plain"
    for axis in sharding.AXES:
        other.sharding[axis] = 1
    return other


def without_remat(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the same run spelled out, with nothing recomputed."""
    other = spelled_out(config)
    other.model.remat = "none"
    return other


def _abstract(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
