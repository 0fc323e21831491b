"""The dense text models of Gemma 4.

Blocks as in Gemma 3, with these differences:

  - Layers that see all have heads of another size and number than those with a window,
    rotate only some of their pairs, and may have one kernel for keys and values.
  - The last layers may have no keys and values of their own: they use those of the last
    layer of their kind (with or without a window) that has them.
  - Each layer may have a token embedding of its own, which it gates and adds.
  - Values are normalised too; scores are not scaled; a layer's output is multiplied by
    a scalar; norms multiply by their scale, not by one plus it.

Layers of different shapes cannot form one stack. The kinds of layers repeat, usually
every six layers: a stack here holds periods of layers, `layers/at_0` to `layers/at_5`,
and another those without keys of their own, `sharing/at_0` and so on.

The mixture of experts (26B-A4B) is another model and is refused.

References:
  Google DeepMind, Gemma 4, 2026, as transformers' models/gemma4 computes it.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lorax import losses
from lorax.models import (
    context,
    decoder_config,
    gemma4_config,
    hf_config,
    layers,
    remat,
    rope,
)

Config = gemma4_config.Config
entries = gemma4_config.entries
ALIASES = decoder_config.ALIASES
IGNORED = decoder_config.IGNORED

NAMES = (
    *("input", "q", "k", "v", "attention", "o", "gate", "up", "down"),
    *("extra_gate", "extra_up"),
)
"""Names of a layer's tensors, for `remat`."""


class Block(nn.Module):
    """One layer.

    Attributes:
      config: of the family.
      window: of the layer; 0: it sees all.
      sharing: the layer uses the keys and values that it is given.
    """

    config: Config
    window: int
    sharing: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, own: Any, pair: Any, shared: Any
    ) -> tuple[jax.Array, Any, Any]:
        """Returns the next residual stream, keys and values, and the layer's cache.

        Args:
          x: the residual stream.
          own: the layer's cache and its embedding of the tokens.
          pair: keys and values for a layer that shares.
          shared: what every layer receives.
        """
        config = self.config
        x = remat.named(x, "input")
        mixed, pair, kept = self._attention(
            self._norm("norm_attn")(x), own, pair, shared
        )
        x = x + self._norm("norm_attn_out")(mixed)
        h = self._norm("norm_mlp")(x)
        hidden = config.hidden * (2 if config.wide and self.sharing else 1)
        gate = layers.projection(hidden, "gate", config)(h)
        up = layers.projection(hidden, "up", config)(h)
        h = layers.projection(config.width, "down", config)(self._act(gate) * up)
        x = x + self._norm("norm_mlp_out")(h)
        if config.extra:
            gate = self._act(layers.projection(config.extra, "extra_gate", config)(x))
            h = layers.projection(config.width, "extra_up", config)(gate * own["extra"])
            x = x + self._norm("norm_extra")(h)
        scalar = self.param("scalar", nn.initializers.ones, (1,), config.param_dtype)
        return x * scalar.astype(x.dtype), pair, kept

    def _attention(
        self, x: jax.Array, own: Any, pair: Any, shared: Any
    ) -> tuple[jax.Array, Any, Any]:
        config, bias = self.config, self.config.qkv_bias
        kv_heads, size = config.heads_of(self.window)

        def read(heads: int, name: str) -> jax.Array:
            return layers.projection((heads, size), name, config, use_bias=bias)(x)

        angles = shared["angles"][bool(self.window)]
        q = rope.rotate(self._norm("norm_q")(read(config.heads, "q")), angles)
        kept = None
        if not self.sharing:
            k = read(kv_heads, "k")
            v = k if config.k_is_v and not self.window else read(kv_heads, "v")
            k = rope.rotate(self._norm("norm_k")(k), angles)
            v = layers.rms_norm("norm_v", config, use_scale=False)(v)
            k, v, kept = layers.remember(k, v, own["cache"], shared["slot"])
            pair = k, v
        k, v = pair
        seen = pair if shared["slot"] is not None else None  # by the cache, or alone
        mixed = layers.attend(q, k, v, seen, self.window, shared, config, scale=1.0)
        mixed = remat.named(mixed, "attention")
        out = layers.projection(config.width, "o", config, use_bias=bias, axis=(-2, -1))
        return out(mixed), pair, kept

    def _act(self, x: jax.Array) -> jax.Array:
        return hf_config.ACTIVATIONS[self.config.activation](x)

    def _norm(self, name: str) -> nn.RMSNorm:
        return layers.rms_norm(name, self.config)


class Period(nn.Module):
    """The layers of one period; see `layers.run_layers` for its arguments.

    The flow through the layers is the residual stream and, by kind of layer, the keys
    and values of the last layer that had its own.
    """

    config: Config
    stack: str

    @nn.compact
    def __call__(self, flow: Any, own: Any, shared: Any) -> tuple[Any, Any]:
        """Returns the next flow and the caches of the layers."""
        x, pairs = flow
        block = layers.checkpointed(Block, self.config, NAMES)
        caches: dict[str, Any] = {}
        for i, window in enumerate(self.config.period(self.stack)):
            name, kind = f"at_{i}", bool(window)
            part = jax.tree.map(lambda leaf, i=i: leaf[i], own["extra"])
            part = {"extra": part, "cache": (own["cache"] or {}).get(name)}
            sharing = self.stack == "sharing"
            given = shared["pairs"][kind] if sharing else None
            x, pair, kept = block(self.config, window, sharing, name=name)(
                x, part, given, shared
            )
            caches |= {} if kept is None else {name: kept}
            if pairs is not None:
                pairs = {**pairs, kind: pair}
        return (x, pairs), caches or None


class Model(nn.Module):
    """Maps tokens to logits of the next token."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        real: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: context.Cache | None = None,
        deterministic: bool = True,
        last_only: bool = False,
        hidden: bool = False,
    ) -> Any:
        """Reads tokens; arguments and result are those of `llama.Model`."""
        del deterministic
        config = self.config
        rows = context.rows(
            tokens,
            config,
            positions=positions,
            real=real,
            segments=segments,
            cache=cache,
        )
        embed = layers.embedding(config.vocabulary, "embed", config)
        x = _scaled(embed(rows.tokens), config.width**0.5, config)
        extra = self._extra(rows.tokens, x) if config.extra else None
        angles = {
            True: config.local_rope.angles(rows.positions, config.head_dim),
            False: config.rope.angles(rows.positions, config.far_head_dim),
        }
        shared = {"angles": angles, **rows.shared}
        x, kept = self._run(x, extra, cache, shared)
        x = layers.rms_norm("norm_out", config)(rows.result(x, last_only))
        if hidden:
            return rows.seen.result(x, kept)
        logits = layers.capped(layers.head(x, embed, config), config.logit_cap)
        return rows.seen.result(logits, kept)

    def _run(
        self, x: jax.Array, extra: Any, cache: context.Cache | None, shared: Any
    ) -> tuple[jax.Array, Any]:
        """Runs both stacks; returns the last x, and keys and values for the cache."""
        config, first, kept = self.config, 0, None
        slots = x.shape[1] if cache is None else cache.length
        pairs: Any = None
        if config.sharing:
            empty = {
                bool(window): jnp.zeros(
                    (x.shape[0], slots, *config.heads_of(window)), config.dtype
                )
                for window in config.windows
            }
            pairs = {kind: (zeros, zeros) for kind, zeros in empty.items()}
        for stack, periods in config.stacks.items():
            sharing, size = stack == "sharing", len(config.period(stack))
            end = first + periods * size
            own: dict[str, Any] = {"extra": None, "cache": None}
            if extra is not None:
                part = extra[first:end]
                own["extra"] = part.reshape(periods, size, *part.shape[1:])
            if cache is not None and not sharing:
                own["cache"] = {
                    name: (cache.k[name], cache.v[name]) for name in cache.k
                }
            told = {**shared, "pairs": pairs} if sharing else shared
            (x, pairs), caches = layers.run_layers(
                Period,
                config,
                (x, None if sharing else pairs),
                own,
                told,
                length=periods,
                names=(),
                options=(stack,),
                name=stack,
            )
            first, kept = end, kept if sharing else caches
        if kept is None:
            return x, None
        return x, tuple({name: pair[i] for name, pair in kept.items()} for i in (0, 1))

    def _extra(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """The layers' own embeddings, `[layers, batch, time, extra]`."""
        config = self.config
        size = config.layers * config.extra
        embed = layers.embedding(
            config.extra_vocabulary, "embed_extra", config, width=size
        )
        known = _scaled(embed(tokens), config.extra**0.5, config)
        read = layers.projection(size, "extra", config)(x) * config.width**-0.5
        shape = (*tokens.shape, config.layers, config.extra)
        read = layers.rms_norm("norm_extra", config)(read.reshape(shape))
        return jnp.moveaxis((read + known.reshape(shape)) * 2**-0.5, 2, 0)

    def head_of(self, params: Any) -> losses.Head:
        """Returns the head among the parameters."""
        cap = self.config.logit_cap
        return layers.head_of(params, self.config)._replace(soft_cap=cap)

    def cache(self, batch: int, length: int) -> context.Cache:
        """Returns an empty cache of `length` slots."""
        config = self.config
        periods = config.stacks["layers"]
        parts = {
            f"at_{i}": context.empty_cache(
                periods, batch, length, *config.heads_of(window), config.dtype
            )
            for i, window in enumerate(config.period("layers"))
        }
        any_part = parts["at_0"]
        return context.Cache(
            {name: part.k for name, part in parts.items()},
            {name: part.v for name, part in parts.items()},
            any_part.real,
            any_part.index,
        )


def _scaled(x: jax.Array, factor: float, config: Config) -> jax.Array:
    """An embedding times a factor that is rounded as the parameters are."""
    return x * jnp.asarray(factor, config.param_dtype).astype(config.dtype)
