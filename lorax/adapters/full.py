"""A leaf trained directly: heads, norms, biases (PEFT's `modules_to_save`)."""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from lorax import tree
from lorax.adapters import layout
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Field, KernelSpec, TargetSpec


@register("full")
@flax.struct.dataclass
class Full(Parametrisation):
    """Replaces its leaf by a trainable copy.

    Attributes:
      value: the leaf's shape, in the dtype the target asked for (float32 by default);
        `merge` casts it to the leaf's dtype.
    """

    value: jax.Array

    fields = {"value": Field("value", "leaf")}
    replaces = True

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> Full:
        """Returns a copy of the leaf, which is abstract if the leaf is."""
        del key, shared
        leaf = kernel.value
        if isinstance(leaf, jax.ShapeDtypeStruct):
            like = jax.ShapeDtypeStruct
            return cls(like(leaf.shape, target.dtype, sharding=leaf.sharding))  # type: ignore[arg-type]
        return cls(jnp.array(leaf, target.dtype))

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the value has the leaf's shape."""
        tree.require_adaptable(path, leaf)
        if self.value.shape != leaf.shape:
            raise ValueError(
                f"{path}: the adapter holds a value of shape {self.value.shape}, but "
                f"the leaf has {leaf.shape}; was it made for another model?"
            )

    def factors(self, kernel: jax.Array) -> None:
        """Returns None: the leaf is replaced, so there is no low-rank form."""
        del kernel

    def delta(self, kernel: jax.Array) -> jax.Array:
        """Returns how far the value has moved from the leaf, at least float32."""
        dtype = layout.wide(kernel)
        return self.value.astype(dtype) - kernel.astype(dtype)

    def merge(self, kernel: jax.Array) -> jax.Array:
        """Returns the value in the leaf's dtype."""
        return self.value.astype(kernel.dtype)
