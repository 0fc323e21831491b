"""How the next token is chosen from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rule:
    """Temperature, then the `top_k` likeliest tokens, then the likeliest mass `top_p`.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: number of tokens to choose among; 0: all.
      top_p: the fewest tokens that have at least this probability together (nucleus
        sampling, Holtzman et al., arXiv:1904.09751); 1: all.
      no_repeat: no sequence of this many tokens occurs twice, the prompt included; 0:
        any may.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or self.no_repeat < 0:
            raise ValueError(f"{self}: no number may be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; give a probability in (0, 1]")

    def choose(self, keys: jax.Array, logits: jax.Array) -> jax.Array:
        """Returns a token for every row of `logits: [batch, vocabulary]`.

        Args:
          keys: `[batch]`, one for each row.
          logits: -inf where a token is banned.
        """
        if not self.temperature:
            return jnp.argmax(logits, axis=-1)
        logits = logits / self.temperature
        if self.top_k:
            least = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0]
            logits = jnp.where(logits < least[:, -1:], -jnp.inf, logits)
        if self.top_p < 1:
            falling = -jnp.sort(-logits, axis=-1)
            shares = jax.nn.softmax(falling, axis=-1)
            before = jnp.cumsum(shares, axis=-1) - shares  # mass of likelier tokens
            least = jnp.min(
                jnp.where(before < self.top_p, falling, jnp.inf), axis=-1, keepdims=True
            )
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.vmap(jax.random.categorical)(keys, logits)

    def banned(
        self, history: jax.Array, real: jax.Array, index: jax.Array, vocabulary: int
    ) -> jax.Array:
        """Returns which tokens would repeat a sequence, bool `[rows, vocabulary]`.

        Args:
          history: int `[rows, slots]`, the tokens so far.
          real: bool `[rows, slots]`; what is not real is not part of a sequence.
          index: slot of the next token.
          vocabulary: number of tokens.
        """
        n, (rows, slots) = self.no_repeat, history.shape
        none = jnp.zeros((rows, vocabulary), bool)
        if not n or slots < n:
            return none
        ends = slots - n + 1  # sequences of n that fit, by their first slot
        same = jnp.arange(ends)[None] + n - 1 < index
        for j in range(n - 1):
            last = index - (n - 1) + j
            token = jnp.take(history, last, axis=1)[:, None]
            whole = jnp.take(real, last, axis=1)[:, None] & (last >= 0)
            same &= (history[:, j : j + ends] == token) & real[:, j : j + ends] & whole
        same &= real[:, n - 1 :]
        row = jnp.arange(rows)[:, None]
        return none.at[row, history[:, n - 1 :]].max(same)


GREEDY = Rule()
