"""Mixtures of experts: a router, and gated MLPs of which each token visits a few.

    l = x Wr [+ br],   chosen = the k experts of the largest l,   y = sum_e w_e f_e(x)

    w = softmax of the chosen l            (Mixtral, Qwen3 with norm_topk_prob, GPT-OSS)
    w = those of softmax(l) over all       (Qwen3 without)

The first is the second divided by its sum. All experts of a layer are one leaf:
`experts/gate_up/kernel` `[experts, in, 2, hidden]`, gates first, and
`experts/down/kernel` `[experts, hidden, out]`.

`dispatch` sets how tokens reach experts; both ways give the same result and drop no
token:

| dispatch | what is computed |
|---|---|
| "ragged" | each token by its experts: rows sorted by expert, `jax.lax.ragged_dot` |
| "dense" | each token by every expert: the definition, for checks |

References:
  Shazeer et al., Outrageously Large Neural Networks, arXiv:1701.06538.
  Jiang et al., Mixtral of Experts, arXiv:2401.04088.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax.attention import machine
from lorax.models import layers, remat
from lorax.types import PyTree

AXIS = "expert"
"""The mesh axis along which devices share experts."""

DISPATCHES = ("ragged", "dense")

NAMES = ("router", "gate_up", "down")
"""Names of a layer's tensors, for `remat`."""


class Sizes(layers.Sizes, Protocol):
    """What the modules below need from a family's Config."""

    @property
    def hidden(self) -> int:
        """Width of an expert."""

    @property
    def experts(self) -> int:
        """Number of experts."""

    @property
    def chosen(self) -> int:
        """Number of experts that a token visits."""

    @property
    def renormalised(self) -> bool:
        """Whether the weights of a token's experts sum to one."""

    @property
    def expert_bias(self) -> bool:
        """Whether gate, up and down of every expert have biases."""

    @property
    def dispatch(self) -> str:
        """One of DISPATCHES."""

    def gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Returns what an expert's `down` reads."""


class Routes(NamedTuple):
    """Which experts tokens go to.

    Attributes:
      experts: int32 `[..., chosen]`.
      weights: float32 `[..., chosen]`.
    """

    experts: jax.Array
    weights: jax.Array


def route(logits: jax.Array, chosen: int, renormalised: bool) -> Routes:
    """Returns the experts of each token, the best first.

    Args:
      logits: `[..., experts]`.
      chosen: number of experts of a token.
      renormalised: whether their weights sum to one.

    Example:
      >>> routes = route(jnp.log(jnp.array([0.1, 0.6, 0.3])), 2, renormalised=False)
      >>> routes.experts.tolist(), [f"{weight:.2f}" for weight in routes.weights]
      ([1, 2], ['0.60', '0.30'])
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    best, experts = jax.lax.top_k(wide, chosen)
    if renormalised:
        return Routes(experts, jax.nn.softmax(best))
    return Routes(experts, jnp.exp(best - jax.nn.logsumexp(wide, -1, keepdims=True)))


class Experts(nn.Module):
    """The gated MLPs of one layer, applied to the tokens that go to them."""

    config: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, routes: Routes) -> jax.Array:
        """Maps `[batch, time, width]` to the weighted sums of the experts' results."""
        config = self.config
        shape = config.experts, config.width, 2, config.hidden
        gate_up = Stack(shape, config, name="gate_up")()
        down = Stack((shape[0], shape[3], shape[1]), config, name="down")()
        run = {"dense": dense, "ragged": ragged}[config.dispatch]
        return run(x, routes, gate_up, down, config.gated)


class Linear(NamedTuple):
    """A linear map of each expert.

    Attributes:
      kernel: `[experts, in, *out]`.
      bias: `[experts, *out]`; None: they have none.
    """

    kernel: Any
    bias: Any = None


class Stack(nn.Module):
    """Linear maps, with kernels drawn from N(0, 0.02^2)."""

    shape: tuple[int, ...]
    config: Sizes

    @nn.compact
    def __call__(self) -> Linear:
        """Returns the maps in the dtype of the computation."""
        config, draw = self.config, nn.initializers.normal(0.02)
        kernel = self.param("kernel", draw, self.shape, config.param_dtype)
        kernel = kernel.astype(config.dtype)
        if not config.expert_bias:
            return Linear(kernel)
        shape, zeros = (self.shape[0], *self.shape[2:]), nn.initializers.zeros
        bias = self.param("bias", zeros, shape, config.param_dtype)
        return Linear(kernel, bias.astype(config.dtype))


def record(layer: nn.Module, logits: jax.Array) -> None:
    """Keeps a router's logits if `apply` has `mutable=[layers.ROUTING]`."""
    if not layer.is_initializing():
        layer.sow(layers.ROUTING, "logits", logits, reduce_fn=lambda _, new: new)


def recorded(routing: PyTree) -> jax.Array:
    """Returns the routers' logits, `[layers, batch, time, experts]`, float32.

    Args:
      routing: the collection `layers.ROUTING` that `apply` returns.
    """
    found = [x.astype(jnp.float32) for x in jax.tree.leaves(routing)]
    return found[0] if found[0].ndim == 4 else jnp.stack(found)


def balance_loss(
    logits: jax.Array, chosen: int, real: jax.Array | None = None
) -> jax.Array:
    """Returns the load-balancing loss of Switch Transformers, over all layers together.

        E sum_e f_e p_e,    f_e = visits of expert e, p_e = its probability, per token

    An even load gives `chosen`. The gradient reaches the router only through p.

    Args:
      logits: of the routers, see `recorded`.
      chosen: number of experts that a token visits.
      real: bool `[batch, time]`, False for padding; None: all are real.

    Example:
      >>> float(balance_loss(jnp.zeros((1, 1, 5, 4)), 2))
      2.0

    References:
      Fedus et al., Switch Transformers, arXiv:2101.03961, equations 4 to 6.
    """
    count, weights = logits.shape[-1], _weights(logits, real)
    visited = jax.lax.top_k(logits, chosen)[1]
    spread = jnp.broadcast_to(weights[..., None], visited.shape)
    visits = jnp.zeros(count).at[visited].add(spread)
    share = jnp.einsum("lbte,lbt->e", jax.nn.softmax(logits), weights)
    return count * (visits * share).sum() / weights.sum() ** 2


def z_loss(logits: jax.Array, real: jax.Array | None = None) -> jax.Array:
    """Returns the mean square of the routers' `logsumexp`, which keeps logits small.

    Args:
      logits: of the routers, see `recorded`.
      real: bool `[batch, time]`, False for padding; None: all are real.

    References:
      Zoph et al., ST-MoE, arXiv:2202.08906, equation 5.
    """
    weights = _weights(logits, real)
    return (jax.nn.logsumexp(logits, -1) ** 2 * weights).sum() / weights.sum()


def _weights(logits: jax.Array, real: jax.Array | None) -> jax.Array:
    ones = jnp.ones(logits.shape[:-1], logits.dtype)
    return ones if real is None else ones * real


Gated = Callable[[jax.Array, jax.Array], jax.Array]


def dense(
    x: jax.Array, routes: Routes, gate_up: Linear, down: Linear, gated: Gated
) -> jax.Array:
    """Applies every expert to every token; those not chosen have weight zero.

    Experts may lie on several devices, as those of `ragged`.

    Args:
      x: `[batch, time, in]`.
      routes: of the tokens.
      gate_up: its kernel is `[experts, in, 2, hidden]`.
      down: its kernel is `[experts, hidden, out]`.
      gated: maps gates and ups to what `down` reads.

    Returns:
      `[batch, time, out]`.
    """
    return _on_devices(_every, x, routes, gate_up, down, gated)


def ragged(
    x: jax.Array, routes: Routes, gate_up: Linear, down: Linear, gated: Gated
) -> jax.Array:
    """Computes the same as `dense` from rows sorted by expert, chosen experts only.

    Under `jax.set_mesh` each device sorts its own tokens. Devices along the mesh axis
    "expert" have some of the experts each; all tokens go there and come back as sums.
    """
    return _on_devices(_sorted, x, routes, gate_up, down, gated)


class Held(NamedTuple):
    """The experts that one device holds.

    Attributes:
      gate_up: of these experts, `[experts, in, 2, hidden]`.
      down: of these experts, `[experts, hidden, out]`.
      first: index of the first one.
      shares: number of devices that share the layer's experts.
    """

    gate_up: Linear
    down: Linear
    first: Any
    shares: int


def _on_devices(
    run: Callable[[jax.Array, Routes, Held, Gated], jax.Array],
    x: jax.Array,
    routes: Routes,
    gate_up: Linear,
    down: Linear,
    gated: Gated,
) -> jax.Array:
    """Runs every device's experts on the tokens of all, and sums the results.

    `run` is `_every` or `_sorted`; the other arguments are those of `dense`.
    """
    rows = machine.cut(machine.ROWS, x.shape[0])
    time = machine.cut(("context",), x.shape[1])
    own = machine.cut((AXIS,), gate_up.kernel.shape[0])
    units = machine.cut(("tensor",), down.kernel.shape[1])
    exchanged = own if AXIS in rows else ()

    def local(x: jax.Array, routes: Routes, gate_up: Linear, down: Linear) -> jax.Array:
        if exchanged:
            x, routes = jax.tree.map(
                lambda part: jax.lax.all_gather(part, AXIS, axis=0, tiled=True),
                (x, routes),
            )
        first = jax.lax.axis_index(AXIS) * gate_up.kernel.shape[0] if own else 0
        if units and down.bias is not None:  # each device's part is summed
            down = down._replace(bias=down.bias / machine.parts(units))
        y = run(x, routes, Held(gate_up, down, first, machine.parts(own)), gated)
        if exchanged:
            y = jax.lax.psum_scatter(y, AXIS, tiled=True)
        summed = units + (() if exchanged else own)
        return jax.lax.psum(y, summed) if summed else y

    if not rows + time + own + units:
        return local(x, routes, gate_up, down)
    spec = PartitionSpec
    tokens = spec(rows or None, time or None)
    experts, hidden = own or None, units or None
    kernels = (
        Linear(spec(experts, None, None, hidden), spec(experts, None, hidden)),
        Linear(spec(experts, hidden), spec(experts)),
    )
    if gate_up.bias is None:
        kernels = kernels[0]._replace(bias=None), kernels[1]._replace(bias=None)
    mapped = jax.shard_map(
        local, in_specs=(tokens, tokens, *kernels), out_specs=tokens, check_vma=False
    )
    return mapped(x, routes, gate_up, down)


def _every(x: jax.Array, routes: Routes, held: Held, gated: Gated) -> jax.Array:
    """Takes all tokens at once; experts of other devices get one-hot rows of zeros."""
    gate_up, down = held.gate_up, held.down
    count = gate_up.kernel.shape[0]
    of = jax.nn.one_hot(routes.experts - held.first, count, dtype=routes.weights.dtype)
    weights = jnp.einsum("btk,btke->ebt", routes.weights, of)
    each = jnp.broadcast_to(x, (count, *x.shape))  # so that experts are a batch
    both = jnp.einsum("ebtd,edgf->ebtgf", each, gate_up.kernel)
    if gate_up.bias is not None:
        both += gate_up.bias[:, None, None]
    both = remat.named(both, "gate_up")
    y = jnp.einsum(
        "ebtf,efd->ebtd", gated(both[..., 0, :], both[..., 1, :]), down.kernel
    )
    if down.bias is not None:
        y += down.bias[:, None, None]
    y = remat.named(y, "down")
    return jnp.einsum("ebtd,ebt->btd", y, weights.astype(y.dtype))


def _sorted(x: jax.Array, routes: Routes, held: Held, gated: Gated) -> jax.Array:
    """Takes an even share of the load at a time; the rows beyond it wait their turn.

    Memory is that of one share, time is that of the busiest device, and no row is
    dropped.
    """
    gate_up, down, shares = held.gate_up, held.down, held.shares
    count, chosen = gate_up.kernel.shape[0], routes.experts.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    own = routes.experts.reshape(-1) - held.first
    own = jnp.where((own >= 0) & (own < count), own, count)  # the others come last
    order = jnp.argsort(own)
    ends = jnp.cumsum(jnp.bincount(own, length=count + 1)[:count])
    wide = jax.tree.map(lambda x: x.reshape(*x.shape[: x.ndim - 2], -1), gate_up)

    def apply(rows: jax.Array, sizes: jax.Array, at: jax.Array, map_: Linear) -> Any:
        y = jax.lax.ragged_dot(rows, map_.kernel, sizes)
        return y if map_.bias is None else y + map_.bias[own[at]]  # clipped: not real

    def share(begin: jax.Array, at: jax.Array) -> jax.Array:
        sizes = jnp.diff(jnp.clip(ends - begin, 0, at.size), prepend=0)
        sizes = sizes.astype(jnp.int32)
        both = apply(tokens[at // chosen], sizes, at, wide)
        gate, up = jnp.split(remat.named(both, "gate_up"), 2, axis=-1)
        y = apply(gated(gate, up), sizes, at, down)
        real = begin + jnp.arange(at.size) < ends[-1]
        return jnp.where(real[:, None], y, 0)

    def turn(_: None, own: Any) -> tuple[None, jax.Array]:
        begin, at = own
        idle = jnp.zeros((at.size, x.shape[-1]), tokens.dtype)
        return None, jax.lax.cond(begin < ends[-1], share, lambda *_: idle, begin, at)

    turns = order.reshape(shares, -1)
    begins = jnp.arange(shares) * turns.shape[1]
    if shares == 1:
        y = share(begins[0], turns[0])
    else:
        y = jax.lax.scan(jax.checkpoint(turn), None, (begins, turns))[1]
    y = remat.named(y.reshape(order.size, -1), "down")[jnp.argsort(order)]
    y = y.reshape(*routes.experts.shape, -1)
    return jnp.einsum("btkd,btk->btd", y, routes.weights.astype(y.dtype))
