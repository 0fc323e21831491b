"""Trains chosen rows of an embedding, such as the tokens added to a vocabulary.

    W = W0 + scale * E @ d        E: [vocabulary, n], one-hot columns of the rows

Only d trains, one vector for each of n tokens. In a tied head, the same rows are the
tokens' columns; an untied head, a kernel `[*in, vocabulary]`, has its own adapter.
PEFT's `trainable_token_indices` trains the rows themselves, this class what is added to
them: the function is the same, and weight decay here pulls towards the base.

E is formed where it is used and briefly takes `n * vocabulary` numbers: negligible
beside the embedding for tens or hundreds of tokens. For a tenth of the vocabulary,
train all of it (`adapter="full"`).

References:
  Mangrulkar et al., PEFT, https://github.com/huggingface/peft: `TrainableTokensModel`.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from lorax.adapters import layout, making
from lorax.adapters.lora import Lora
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, TargetSpec


@register("rows")
@flax.struct.dataclass
class Rows(Parametrisation):
    """What is added to some rows of an embedding, or to some outputs of a head.

    Attributes:
      axes: the leaf's in and out axes; one of them is the vocabulary.
      rows: the numbers of the tokens, increasing.
      size: size of the vocabulary.
      embedding: `[n, *out]`, for a leaf that is looked up; None for a head.
      head: `[*in, n]`, for an untied head; None for an embedding.
      scale: the factor on the update.
    """

    axes: Axes = flax.struct.field(pytree_node=False)
    rows: tuple[int, ...] = flax.struct.field(pytree_node=False)
    size: int = flax.struct.field(pytree_node=False)
    embedding: jax.Array | None = None
    head: jax.Array | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    fields = {
        "embedding": Field("rows", "rows out", decays=True, optional=True),
        "head": Field("rows", "in rows", decays=True, optional=True),
    }
    additive = True
    by_rows = True
    drops = False

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> Rows:
        """Returns zeros for every row that the target names."""
        del key, shared
        assert target.rows is not None
        in_, out, _ = making.sizes(kernel, target)
        axes, rows, n = kernel.linear_axes(), tuple(target.rows), len(target.rows)
        if kernel.op == "gather":
            zeros = jnp.zeros((n, *out), target.dtype)
            return cls(axes, rows, in_[0], embedding=zeros)
        zeros = jnp.zeros((*in_, n), target.dtype)
        return cls(axes, rows, out[0], head=zeros)

    def check(self, path: str, leaf: jax.Array) -> None:
        """Raises ValueError unless the rows fit the leaf and match their numbers."""
        layout.check(path, self, leaf)
        if self.embedding is not None:
            n, axis = self.embedding.shape[0], self.axes.in_[0]
        else:
            assert self.head is not None
            n, axis = self.head.shape[-1], self.axes.out[0]
        size = leaf.shape[axis]
        if n != len(self.rows) or size != self.size:
            raise ValueError(
                f"{path}: the adapter has {n} rows, numbered {self.rows}, of a "
                f"vocabulary of {self.size}, but the leaf has {size}; was it made for "
                "another model? hf.resize_embeddings changes a model's vocabulary size"
            )

    def as_lora(self) -> Lora:
        """Returns the same update as a Lora of one rank and one-hot column per row."""
        rows = jnp.asarray(self.rows)
        if self.embedding is not None:
            own = self.embedding
            places = jax.nn.one_hot(rows, self.size, axis=0, dtype=own.dtype)
            return Lora(places, own, self.scale, self.axes)
        assert self.head is not None
        places = jax.nn.one_hot(rows, self.size, dtype=self.head.dtype)
        return Lora(self.head, places, self.scale, self.axes)

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns one-hot factors that place the rows, and the rows themselves."""
        return self.as_lora().factors(kernel)
