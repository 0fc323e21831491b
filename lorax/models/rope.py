"""Rotary positions, and how checkpoints stretch them beyond their training length.

Pairs `(x_i, x_{i + d/2})` are rotated by the angle `position * rate_i` with

    rate_i = base^(-2 i / d),    i = 0 .. d/2 - 1

    linear    rate_i / factor
    llama3    long waves as linear, short ones unchanged, a blend in between
    yarn      likewise, by the number of turns in the original length; all scores are
              multiplied by the square of 0.1 ln(factor) + 1
    longrope  rate_i / short_i, or rate_i / long_i in sequences beyond the original
              length; all scores are multiplied by 1 + ln(factor) / ln(original)
    proportional  only the first `part` of the pairs is rotated, by rate_i / factor

References:
  Su et al., RoFormer, arXiv:2104.09864. Chen et al., arXiv:2306.15595 (linear). Peng et
  al., YaRN, arXiv:2309.00071. Ding et al., LongRoPE, arXiv:2402.13753. Llama 3.1's
  released code (llama3).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax import untrusted

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
_POSITIVE = untrusted.number(above=0)
RULES = {
    "rope_theta": untrusted.number(most=1e30, above=1),
    "rope_type": untrusted.TEXT,
    "type": untrusted.TEXT,
    "factor": _POSITIVE,
    "original_max_position_embeddings": untrusted.whole(1),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "beta_slow": _POSITIVE,
    "beta_fast": _POSITIVE,
    "attention_factor": _POSITIVE,
    "truncate": untrusted.FLAG,
    "partial_rotary_factor": untrusted.number(above=0, most=1),
    "short_factor": untrusted.listed(_POSITIVE),
    "long_factor": untrusted.listed(_POSITIVE),
}
"""What values the fields of a rotation may have."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rates of the rotation.

    Attributes:
      base: theta; wavelength of the slowest pair over 2 pi.
      kind: one of `KINDS`.
      factor: by which the original length is stretched.
      original: the original length, in tokens.
      low: llama3: waves longer than `original / low` are fully stretched; yarn's
        beta_slow.
      high: llama3: waves shorter than `original / high` are unchanged; yarn's
        beta_fast.
      attention: yarn and longrope: factor on cosine and sine; None: from `factor`,
        `0.1 ln(factor) + 1` and `sqrt(1 + ln(factor) / ln(original))`.
      truncate: yarn: the bounds of the blend are rounded to whole pairs.
      part: share of a head that is rotated; proportional: share of its pairs.
      short: longrope: what each pair's rate is divided by.
      long: longrope: likewise in sequences longer than `original`.
    """

    base: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    attention: float | None = None
    truncate: bool = True
    part: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def rates(self, size: int, *, long: bool = False) -> np.ndarray:
        """Returns radians per token, float64, for the pairs that are rotated.

        Args:
          size: of a head.
          long: longrope: of a sequence longer than the original length.
        """
        if self.kind == "proportional":
            rates = self.base ** (-np.arange(0, size, 2) / size)
            turned = np.arange(size // 2) < int(self.part * size // 2)
            return np.where(turned, rates, 0) / self.factor
        size = int(size * self.part)
        rates = self.base ** (-np.arange(0, size, 2) / size)
        if self.kind == "linear":
            return rates / self.factor
        if self.kind == "longrope":
            return rates / np.array(self.long if long else self.short)
        if self.kind == "llama3":
            turns = self.original * rates / (2 * math.pi)  # in the original length
            keep = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
            return rates * (keep + (1 - keep) / self.factor)
        if self.kind == "yarn":
            bounds = self._pair(self.high, size), self._pair(self.low, size)
            keep = 1 - _ramp(*bounds, size, self.truncate)
            return rates * (keep + (1 - keep) / self.factor)
        return rates

    def _pair(self, turns: float, size: int) -> float:
        """The pair that makes this many turns in the original length."""
        return (
            size
            * math.log(self.original / (turns * 2 * math.pi))
            / (2 * math.log(self.base))
        )

    @property
    def gain(self) -> float:
        """Factor on cosine and sine."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention is not None:
            return self.attention
        if self.kind == "longrope":
            more = math.log(max(self.factor, 1)) / math.log(self.original)
            return math.sqrt(1 + more)
        return 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1

    def angles(
        self, positions: jax.Array, size: int, slots: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns cosine and sine, float32 `[batch, time, 1, pairs]`.

        Args:
          positions: int `[batch, time]`.
          size: of a head.
          slots: of the cache, if there is one. Rates of longrope depend on the length
            of the sequence, and keys in a cache cannot be rotated again: a cache with
            more slots than the original length uses the long rates from its first
            token on, as vLLM does by its longest sequence.
        """
        rates = jnp.asarray(self.rates(size), jnp.float32)
        if self.kind == "longrope":
            length = jnp.max(positions) + 1 if slots is None else slots
            long = jnp.asarray(self.rates(size, long=True), jnp.float32)
            rates = jnp.where(length > self.original, long, rates)
        angle = (positions[..., None].astype(jnp.float32) * rates)[..., None, :]
        return self.gain * jnp.cos(angle), self.gain * jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates `x: [batch, time, heads, head_dim]`, pairing its halves.

    Features beyond the pairs that have angles stay as they are.
    """
    cos, sin = (part.astype(x.dtype) for part in angles)
    pairs = cos.shape[-1]
    left, right, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    turned = left * cos - right * sin, right * cos + left * sin
    return jnp.concatenate([*turned, rest], -1)


def _ramp(low: float, high: float, size: int, whole: bool) -> np.ndarray:
    """0 up to pair `low`, 1 from pair `high` on."""
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    span = max(high - low, 1e-3)
    return np.clip((np.arange(size // 2) - low) / span, 0, 1)


def from_hf(
    fields: Any, positions: int, partial: bool = False, base: float = 10_000.0
) -> Rope:
    """Reads `rope_parameters` (v5), or `rope_theta` and `rope_scaling` (v4).

    Args:
      fields: of the config.json.
      positions: its `max_position_embeddings`.
      partial: the family rotates a part of a head, if its config says so.
      base: for a config that has none.

    Raises:
      ValueError: a kind or a field is not implemented, or a field is missing.
    """
    theta = fields.take("rope_theta", RULES["rope_theta"], None)
    scaling = fields.take("rope_scaling", untrusted.TABLE, {})
    given = fields.take("rope_parameters", untrusted.TABLE, {})
    where = "rope_parameters" if given else "rope_scaling"
    values = dict(given or scaling)
    for name, rule in RULES.items():
        if values.get(name) is not None:
            untrusted.check(f"config.json: {where}.{name}", values[name], rule)
    named = "type" if values.get("rope_type") is None else "rope_type"
    kinds = {values.pop(k) for k in ("rope_type", "type") if values.get(k) is not None}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in KINDS:
        raise ValueError(
            f"config.json: {where}.{named}={kind!r} is not implemented; known are "
            f"{', '.join(KINDS)}"
        )
    base = values.pop("rope_theta", None) or theta or base
    if theta is not None and base != theta:
        raise ValueError(f"config.json: rope_theta is given as {theta} and as {base}")
    try:
        return _read(kind, float(base), values, positions, partial)
    except ValueError as error:
        raise ValueError(f"config.json: {where}: {error}") from None


def _read(
    kind: str, base: float, values: dict[str, Any], positions: int, partial: bool
) -> Rope:
    original = values.pop("original_max_position_embeddings", None)
    need: dict[str, tuple[str, ...]] = {"linear": ("factor",), "yarn": ("factor",)}
    need["llama3"] = ("factor", "low_freq_factor", "high_freq_factor")
    need["longrope"] = ("short_factor", "long_factor")
    missing = [n for n in need.get(kind, ()) if values.get(n) is None]
    if kind == "llama3" and original is None:
        missing.append("original_max_position_embeddings")
    if missing:
        raise ValueError(f"rope type {kind!r} lacks {', '.join(missing)}")
    own: dict[str, Any] = {}
    if partial or kind == "proportional":
        own["part"] = float(values.pop("partial_rotary_factor", None) or 1)
    if kind == "proportional":
        own["factor"] = float(values.pop("factor", None) or 1)
    if kind == "longrope":
        original = int(original or positions)
        own |= {n: tuple(values.pop(f"{n}_factor")) for n in ("short", "long")}
        own["factor"] = float(values.pop("factor", None) or positions / original)
        own["attention"] = values.pop("attention_factor", None)
        if original < 2:
            raise ValueError(
                f"original_max_position_embeddings={original} is too short"
            )
    elif kind in need:
        own["factor"] = float(values.pop("factor"))
    if kind == "llama3":
        own |= {"low": values.pop("low_freq_factor")}
        own |= {"high": values.pop("high_freq_factor")}
    if kind == "yarn":
        own |= {"low": values.pop("beta_slow", None) or 1.0}
        own |= {"high": values.pop("beta_fast", None) or 32.0}
        own |= {"attention": values.pop("attention_factor", None)}
        truncate = values.pop("truncate", None)
        own |= {"truncate": truncate is None or truncate}
    if kind in ("llama3", "yarn", "longrope"):
        own["original"] = int(original or positions)
    left = {n: v for n, v in values.items() if not untrusted.ZERO.fits(v)}
    if left:
        raise ValueError(f"rope type {kind!r} has unknown fields {left}")
    if kind in ("llama3", "yarn") and own["low"] >= own["high"]:
        names = {"llama3": "low_freq_factor high_freq_factor"}
        low, high = names.get(kind, "beta_slow beta_fast").split()
        raise ValueError(f"{low}={own['low']} must be below {high}={own['high']}")
    return Rope(base=base, kind=kind, **own)


def to_hf(rope: Rope) -> dict[str, Any]:
    """Returns the fields that transformers 4 and 5 both read."""
    values: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        values["factor"] = rope.factor
    if rope.kind == "longrope":
        values |= {"short_factor": [*rope.short], "long_factor": [*rope.long]}
    if rope.part != 1:
        values["partial_rotary_factor"] = rope.part
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    if rope.kind == "yarn":
        values |= {"beta_slow": rope.low, "beta_fast": rope.high}
        values |= {"truncate": rope.truncate}
    if rope.attention is not None:
        values["attention_factor"] = rope.attention
    if rope.original:
        values["original_max_position_embeddings"] = rope.original
    written: dict[str, Any] = {"rope_theta": rope.base}
    written["rope_parameters"] = {**values, "rope_theta": rope.base}
    if rope.kind != "default":
        written["rope_scaling"] = values
    return written
