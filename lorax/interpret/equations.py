"""What is read off an equation, whatever its primitive."""

from __future__ import annotations

import jax

Typed = jax.Array | jax.core.ShapedArray
"""An array, or what is known of one before the program runs."""


def aval(atom: jax.core.Atom) -> jax.core.ShapedArray:
    """Returns the shape, the dtype and the sharding of a variable or a literal."""
    kind = atom.aval
    assert isinstance(kind, jax.core.ShapedArray)
    return kind
