"""The tables that codes index: NF4, MXFP4, and the 8-bit dynamic map.

References:
  Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314,
  appendix E.
  Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# quantiles of a normal distribution, scaled to [-1, 1], with an exact zero
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the 4-bit floats
MXFP4 = np.array([*(-value for value in _E2M1[:0:-1]), *_E2M1], np.float32)
BOOKS = {"nf4": NF4, "mxfp4": MXFP4}
"""In ascending order; MXFP4 has 15 entries, since its two zeros are the same value."""


def scaled(book: str, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns `table[codes] * scales` for 4-bit codes, in the dtype of the scales.

    A chain of selects picks among the multiples of a scale. It is elementwise, so XLA
    fuses it into whatever reads the values. No backend fuses a gather; a tree of
    selects materialises its leaves; and selecting among constants instead of multiples
    would broadcast each to a kernel's size outside the loop over layers.

    Args:
      book: the table's name.
      codes: below 16.
      scales: broadcast against the codes.
    """
    first, *others = (scales * value for value in BOOKS[book])
    values = jnp.broadcast_to(first, codes.shape)
    for code, value in enumerate(others, 1):
        values = jnp.where(codes == code, value, values)
    return values


def nearest(book: str, values: jax.Array) -> jax.Array:
    """Returns the code nearest to each value, uint8; ties go to the lower code."""
    return _bucket(BOOKS[book], values).astype(jnp.uint8)


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 values of the signed dynamic type, in ascending order, float32.

    A code has a sign, a decimal exponent from -6 to 0, and the remaining bits as its
    fraction: 2^e values for exponent e - 6, at the midpoints of equal steps from 0.1
    to 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = np.linspace(0.1, 1, 2**exponent + 1, dtype=np.float32)
        middle = (steps[:-1] + steps[1:]) / np.float32(2)
        positive = np.float32(10.0 ** (exponent - 6)) * middle
        values += [*positive, *-positive]
    return np.sort(np.array(values, np.float32))


def dynamic_values(codes: jax.Array) -> jax.Array:
    """Returns the float32 values of 8-bit dynamic codes."""
    return jnp.asarray(dynamic_map())[codes]


def nearest_dynamic(values: jax.Array) -> jax.Array:
    """Returns the 8-bit dynamic code nearest to each value, uint8."""
    return _bucket(dynamic_map(), values).astype(jnp.uint8)


def _bucket(table: np.ndarray, values: jax.Array) -> jax.Array:
    """How many midpoints between adjacent table entries lie below each value."""
    middle = (table[1:] + table[:-1]) / np.float32(2)
    return jnp.searchsorted(jnp.asarray(middle), values, side="left")
