"""Shared by the families: a layer's cache, the stack of layers, and their parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax import attention, losses
from lorax.attention import machine
from lorax.models import remat
from lorax.types import PyTree

ROUTING = "routing"
"""The collection of routers' logits; see `experts`."""


class Sizes(Protocol):
    """What the parts below need from a family's Config."""

    @property
    def width(self) -> int:
        """Width of the residual stream."""

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""

    @property
    def scan(self) -> bool:
        """Whether layers are stacked on axis 0."""

    @property
    def remat(self) -> str:
        """What to recompute; see `remat`."""

    @property
    def dtype(self) -> Any:
        """Dtype of the computation."""

    @property
    def param_dtype(self) -> Any:
        """Dtype of the parameters."""


class DecoderSizes(Sizes, Protocol):
    """What they need from a decoder's Config."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""


class Attending(Protocol):
    """What they need if attention has windows and implementations."""

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens that a token sees in each layer, itself included; 0, or empty: all."""

    @property
    def attention(self) -> str:
        """Implementation of `attention.attend` for training; decoding is plain."""

    @property
    def striped(self) -> bool:
        """Whether devices along "context" share rows; see `attention.stripe`."""


def windows(config: Attending) -> jax.Array | None:
    """Returns the window of every layer, for `run_layers`; None: no windows."""
    return jnp.array(config.windows) if config.windows else None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kept: Any,
    window: jax.Array | int | None,
    shared: dict[str, Any],
    config: Attending,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal attention of a layer, within its window if it has one.

    Args:
      q: `[batch, time, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`, of the cache if there is one.
      v: likewise.
      kept: the cache; None: the tokens see only each other.
      window: int `[]`, of the layer; 0: it sees all. A Python int if layers are not
        traced as one; None: no layer has a window.
      shared: from `context.Context.shared`.
      config: of the family.
      scale: of the scores; None for `head_dim ** -0.5`.
      soft_cap: bound on the scores; None: no bound.

    Returns:
      `[batch, time, heads, head_dim]`.
    """
    run = functools.partial(attention.attend, scale=scale, soft_cap=soft_cap)
    # one token, as at init, has no scores to save; a cache is for decoding
    if config.attention == "plain" or kept is not None or q.shape[1] == 1:
        mask = shared["mask"]
        if window is not None:
            mask = mask & ((shared["back"] < window) | (window == 0))
        return run(q, k, v, mask=mask)

    def of(size: int, *qkv: jax.Array) -> jax.Array:
        return run(
            *qkv,
            causal=True,
            window=size or None,
            segments=shared["segments"],
            implementation=config.attention,
            striped=config.striped,
        )

    if isinstance(window, int):
        return of(window, q, k, v)
    sizes = sorted(set(config.windows)) or [0]
    if window is None or len(sizes) == 1:
        return of(sizes[0], q, k, v)
    own = jnp.searchsorted(jnp.array(sizes), window)  # each is static, in a branch
    return jax.lax.switch(own, [functools.partial(of, n) for n in sizes], q, k, v)


def remember(
    k: jax.Array,
    v: jax.Array,
    kept: tuple[jax.Array, jax.Array] | None,
    index: Any,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Writes keys and values into one layer's cache and returns what to attend to.

    Args:
      k: `[batch, time, kv_heads, head_dim]` of the tokens being read.
      v: likewise.
      kept: keys and values of the cache, `[batch, length, kv_heads, head_dim]`.
      index: the slot of the first of these tokens.

    Returns:
      Keys, values, and the new cache of the layer.
    """
    if kept is None:
        return k, v, None

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(old.dtype)
        return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)

    k, v = put(kept[0], k), put(kept[1], v)
    return k, v, (k, v)


def along_batch(x: jax.Array) -> jax.Array:
    """Shards activations `[batch, time, ...]` along these only, under `jax.set_mesh`.

    If parameters are sharded along "fsdp" too, the compiler could shard the width of
    the activations instead, and every device would hold the whole batch. The batch is
    sharded along the axes `machine.ROWS`, the time along "context", where these are
    Auto axes of the mesh that divide it.
    """
    rows = machine.cut(machine.ROWS, x.shape[0])
    time = machine.cut(("context",), x.shape[1])
    if not rows + time:
        return x
    spec = PartitionSpec(rows or None, time) if time else PartitionSpec(rows)
    return jax.lax.with_sharding_constraint(x, spec)


def checkpointed(
    block: type[nn.Module], config: Sizes, names: Sequence[str]
) -> type[nn.Module]:
    """Returns the class of a layer that recomputes as `config.remat` says.

    Args:
      block: the module's class.
      config: of the family.
      names: the names that it gives its tensors.
    """
    if config.remat == "none":
        return block
    policy = remat.policy(config.remat, names)
    return nn.remat(block, prevent_cse=not config.scan, policy=policy)


def run_layers(
    block: type[nn.Module],
    config: Sizes,
    x: PyTree,
    own: PyTree,
    shared: PyTree,
    *,
    length: int,
    names: Sequence[str],
    options: Sequence[Any] = (),
    name: str = "layers",
) -> tuple[PyTree, PyTree]:
    """Runs a stack of blocks `(x, own, shared) -> (x, out)`, inside a compact method.

    With `config.scan`, one layer is traced under `nn.scan`, with leaves stacked on axis
    0 below `layers`; otherwise `length` layers are, `layers_0` and so on. What is kept
    for the backward pass is set by `config.remat`; see `lorax.models.remat`. Blocks
    that hold several layers each, and call `checkpointed` on those, give no names.

    Args:
      block: the module's class, called with the config and the options.
      config: of the family.
      x: what flows through the layers, `[batch, time, ...]`.
      own: a tree of arrays with a leading axis of layers, a slice for each.
      shared: a tree that every layer gets whole.
      length: number of layers.
      names: the names that a block gives its tensors.
      options: further arguments of the block.
      name: of the stack.

    Returns:
      The last x, and the outs with a leading axis of layers.
    """
    x = jax.tree.map(along_batch, x)
    if names:
        block = checkpointed(block, config, names)
    if config.scan:
        return nn.scan(
            block,
            variable_axes={"params": 0, ROUTING: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=length,
        )(config, *options, name=name)(x, own, shared)
    outs = []
    for layer in range(length):
        part = jax.tree.map(lambda leaf, layer=layer: leaf[layer], own)
        x, out = block(config, *options, name=f"{name}_{layer}")(x, part, shared)
        outs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


class Projection(nn.DenseGeneral):
    """A linear map whose output has the same name as itself, for `remat`."""

    def __call__(self, inputs: jax.Array, named: bool = True) -> jax.Array:
        """Maps the axes `axis` of the inputs to `features`.

        Args:
          inputs: of any rank.
          named: False for inputs that depend on parameters alone: a named result of
            those counts as a kernel, see `lorax.discover`.
        """
        outputs = super().__call__(inputs)
        return remat.named(outputs, str(self.name)) if named else outputs


def _gathered_dot(width: int) -> Callable[..., jax.Array]:
    """`dot_general` of a kernel whose width axis is gathered, under `jax.set_mesh`.

    That axis is the one sharded along "fsdp" (`lorax.sharding.LOGICAL`); others stay.
    """

    def dot(x: jax.Array, kernel: jax.Array, *args: Any, **how: Any) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        if kinds.get("fsdp") == jax.sharding.AxisType.Auto:
            free = PartitionSpec.UNCONSTRAINED
            spec = PartitionSpec(*(None if n == width else free for n in kernel.shape))
            kernel = jax.lax.with_sharding_constraint(kernel, spec)
        return jax.lax.dot_general(x, kernel, *args, **how)

    return dot


def projection(
    features: int | tuple[int, ...],
    name: str,
    config: Sizes,
    *,
    use_bias: bool = False,
    axis: int | tuple[int, ...] = -1,
) -> Projection:
    """A linear map with a kernel `[*in, *out]` drawn from N(0, 0.02^2)."""
    lists = remat.parse(config.remat)
    return Projection(
        features,
        dot_general=_gathered_dot(config.width) if lists and lists.gather else None,
        axis=axis,
        use_bias=use_bias,
        kernel_init=nn.initializers.normal(0.02),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def embedding(
    rows: int, name: str, config: Sizes, width: int | None = None
) -> nn.Embed:
    """An embedding `[rows, width]` from N(0, 0.02^2), of the stream's width if None."""
    return nn.Embed(
        rows,
        width or config.width,
        embedding_init=nn.initializers.normal(0.02),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def layer_norm(name: str, config: Sizes) -> nn.LayerNorm:
    """A layer norm with a two-pass variance, because E[x^2] - E[x]^2 cancels."""
    return nn.LayerNorm(
        epsilon=config.eps,
        use_fast_variance=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def rms_norm(name: str, config: Sizes, *, use_scale: bool = True) -> nn.RMSNorm:
    """An RMS norm with a scale, or without."""
    return nn.RMSNorm(
        use_scale=use_scale,
        epsilon=config.eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def head(x: jax.Array, embed: nn.Embed, config: DecoderSizes) -> jax.Array:
    """Logits in float32, through the embedding where `config.tied`."""
    if config.tied:
        logits = embed.attend(x)
    else:
        logits = projection(config.vocabulary, "head", config)(x)
    return logits.astype(jnp.float32)


def capped(logits: jax.Array, cap: float | None) -> jax.Array:
    """Logits within a soft cap; None: no cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def head_of(params: PyTree, config: DecoderSizes) -> losses.Head:
    """Returns the head that `head` applies, from the parameters."""
    if config.tied:
        return losses.Head(params["embed"]["embedding"], tied=True)
    return losses.Head(params["head"]["kernel"])
