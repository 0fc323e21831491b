"""A diagonal between two Walsh-Hadamard transforms, in units of the kernel's columns.

    y = x W0 + scale * C(x),    C(x)_j = n_j [H diag(w) H (s * x) / N]_j

H of size N, the power of two that holds inputs and outputs, has entries of one and
minus one and is never formed: H = H1 (x) H2, each of about sqrt(N). The N numbers w
train. The signs s are drawn once per input size and shared by all kernels of that size;
n_j, the norm of column j of W0, is each kernel's own. Both are frozen.

References:
  Le et al., Fastfood: Approximating Kernel Expansions in Loglinear Time, ICML 2013.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lorax.adapters import Parametrisation, layout, making, register
from lorax.types import Axes, Factors, Field, LinearMap


@register("walsh")
@flax.struct.dataclass
class Walsh(Parametrisation):
    """The update of one kernel or of a stack; trains `[*batch, size]` numbers."""

    weights: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    axes: Axes = flax.struct.field(pytree_node=False)
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    lent: tuple[tuple[str, str], ...] = flax.struct.field(pytree_node=False, default=())
    signs: jax.Array | None = None
    norms: jax.Array | None = None

    fields = {
        "weights": Field("weights", "batch size", decays=True),
        "signs": Field("signs", "in", frozen=True),
        "norms": Field("norms", "batch out", frozen=True),
    }
    additive = True
    absorbs = "weights"
    drops = False

    @classmethod
    def shared(cls, key: jax.Array, chosen: Any) -> dict[str, jax.Array]:
        """Returns random signs for every input size."""
        drawn = {}
        for target, kernel in chosen.values():
            in_, _, _ = making.sizes(kernel, target)
            own = jax.random.fold_in(key, math.prod(in_))
            drawn[_signs(in_)] = jax.random.rademacher(own, in_, jnp.float32)
        return drawn

    @classmethod
    def make(cls, key: jax.Array, kernel: Any, target: Any, shared: Any) -> Any:
        """Returns an adapter of zeros, with its frozen arrays."""
        del key
        in_, out, batch = making.sizes(kernel, target)
        largest = max(math.prod(in_), math.prod(out))
        size = 2 ** math.ceil(math.log2(largest))
        norms = jnp.linalg.norm(making.matrices(kernel, target), axis=-2)
        return cls(
            weights=jnp.zeros((*batch, size), target.dtype),
            scale=target.scale,
            axes=kernel.linear_axes(),
            layers=target.layers,
            lent=(("signs", _signs(in_)), ("norms", f"{kernel.path}/norms")),
            signs=shared[_signs(in_)],
            norms=norms.reshape(*batch, *out),
        )

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns the branch, over the whole stack."""
        in_, out, batch = self.axes.sizes(kernel.shape)
        read, written = math.prod(in_), math.prod(out)
        spread = functools.partial(
            layout.spread, layers=self.layers, depth=layout.depth(kernel, self.axes)
        )
        arrays = {
            "signs": jnp.broadcast_to(self.signs.reshape(read), (*batch, read)),
            "weights": self.scale * spread(self.weights),
            "norms": spread(self.norms).reshape(*batch, written),
        }
        branch = LinearMap(arrays, between_transforms)
        return layout.without_product(kernel, self.axes, branch=branch)


def _signs(in_: tuple[int, ...]) -> str:
    """The name of the signs for inputs of these sizes."""
    return "walsh/" + "x".join(map(str, in_))


def between_transforms(arrays: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Returns C(x): `[n, in] -> [n, out]`, computed in at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    signs, weights, norms = (
        arrays[name].astype(wide) for name in ("signs", "weights", "norms")
    )
    size = weights.shape[-1]
    padded = jnp.pad(signs * x.astype(wide), ((0, 0), (0, size - x.shape[-1])))
    y = transformed(weights * transformed(padded)) / size
    return (norms * y[:, : norms.shape[-1]]).astype(x.dtype)


def transformed(x: jax.Array) -> jax.Array:
    """Returns H x for every row: `[n, size] -> [n, size]`."""
    bits = x.shape[-1].bit_length() - 1
    first, second = (
        jnp.asarray(hadamard(b), x.dtype) for b in (bits // 2, -(-bits // 2))
    )
    grid = x.reshape(-1, len(first), len(second))
    turned = jnp.einsum("nij,ik,jl->nkl", grid, first, second, precision="highest")
    return turned.reshape(x.shape)


def hadamard(bits: int) -> np.ndarray:
    """Returns the matrix of size 2^bits: -1 where row and column share odd bits."""
    index = np.arange(2**bits)
    shared = index[:, None] & index[None]
    return 1.0 - 2.0 * (np.bitwise_count(shared.astype(np.uint32)) % 2)
