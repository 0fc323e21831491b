"""The intrinsic dimension of a task: training in a random subspace of the parameters.

    theta(z) = theta_0 + P z,       z in R^d,  P^T P = I

Only z is trained. Every parameter follows one random coordinate of z, with a random
sign, divided by the square root of how many share it. So P has one entry per row and
orthonormal columns, `|P z| = |z|`, and it costs no more than adding the parameters. The
intrinsic dimension of a task is the smallest d that reaches 90 % of the gain of full
training.

References:
  Li et al., Measuring the Intrinsic Dimension of Objective Landscapes,
  arXiv:1804.08838. Aghajanyan et al., Intrinsic Dimensionality Explains the
  Effectiveness of Language Model Fine-Tuning, arXiv:2012.13255. Li et al., Uni-LoRA,
  arXiv:2506.00799 (this projection).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from lorax import linalg, tree
from lorax.types import PyTree


@flax.struct.dataclass
class RandomSubspace:
    """A random subspace of a tree's floating leaves; pass it to `jit` as an argument.

    Attributes:
      coordinate: `{path: int32}` in each leaf's shape: which entry of z moves a value.
      weight: `{path: float32}` in each leaf's shape: by how much, +- 1 / sqrt(number of
        values that the entry moves).
      dimension: d.
    """

    coordinate: dict[str, jax.Array]
    weight: dict[str, jax.Array]
    dimension: int = flax.struct.field(pytree_node=False)

    def expand(self, origin: PyTree, z: jax.Array) -> PyTree:
        """Returns `origin + P z`, each leaf in its own dtype.

        Args:
          origin: the tree that the subspace was made for: parameters or adapters.
          z: `[dimension]`, initially zero.
        """
        leaves = tree.flatten(origin)
        moved = {}
        for path, weight in self.weight.items():
            leaf, step = leaves[path], weight * z[self.coordinate[path]]
            wide = linalg.wide(leaf)
            moved[path] = (leaf.astype(wide) + step).astype(leaf.dtype)
        return tree.replace(origin, moved)


def random_subspace(key: jax.Array, origin: PyTree, dimension: int) -> RandomSubspace:
    """Draws a subspace.

    Args:
      key: a `jax.random.key`.
      origin: parameters, as in the papers, or adapters (to train LoRA as one vector:
        start with both factors away from zero, since at b = 0 the first step would act
        on b alone).
      dimension: d, from 1 to the number of parameters.

    Returns:
      A `RandomSubspace`: `loss(subspace.expand(params, z), batch)` is differentiated
      with respect to z.

    Raises:
      ValueError: a dimension out of range.

    Example:
      >>> params = {"w": jnp.zeros((3, 2))}
      >>> subspace = random_subspace(jax.random.key(0), params, 2)
      >>> z = jnp.array([3.0, 4.0])
      >>> float(jnp.linalg.norm(subspace.expand(params, z)["w"]).round(4))
      5.0
    """
    leaves = {p: v for p, v in tree.flatten(origin).items() if tree.is_floating(v)}
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    if not 1 <= dimension <= total:
        raise ValueError(
            f"dimension={dimension}; choose from 1 to {total}, the number of parameters"
        )
    chosen, signs = jax.random.split(key)
    # All coordinates get the same number of parameters, up to one.
    flat = (
        jax.random.permutation(chosen, jnp.arange(total, dtype=jnp.int32)) % dimension
    )
    size = jnp.zeros(dimension).at[flat].add(1.0)
    weight = jax.random.rademacher(signs, (total,), jnp.float32) / jnp.sqrt(size[flat])
    coordinates, weights, at = {}, {}, 0
    for path, leaf in leaves.items():
        part = slice(at, at + math.prod(leaf.shape))
        coordinates[path] = flat[part].reshape(leaf.shape)
        weights[path] = weight[part].reshape(leaf.shape)
        at = part.stop
    return RandomSubspace(coordinates, weights, dimension)


def intrinsic_dimension(
    dimensions: Sequence[int],
    scores: Sequence[float],
    start: float,
    full: float,
    share: float = 0.9,
) -> int | None:
    """Returns the smallest dimension that reaches a share of full training's gain.

        (score - start) / (full - start) >= share

    This works for scores that rise and for losses that fall.

    Args:
      dimensions: the dimensions that were trained.
      scores: the score or loss of each.
      start: the score of the untrained model.
      full: the score of full training.
      share: the share to reach; 0.9 as in the papers (their d_90).

    Returns:
      The dimension, or None if none reaches it.

    Raises:
      ValueError: not one score per dimension, or no gain from full training.

    Example:
      >>> intrinsic_dimension((10, 100, 1000), (0.6, 0.86, 0.9), start=0.5, full=0.9)
      100
    """
    if len(dimensions) != len(scores):
        raise ValueError(
            f"{len(dimensions)} dimensions and {len(scores)} scores; give one score "
            "per dimension"
        )
    if full == start:
        raise ValueError(f"full={full} is equal to start, so there is no gain to share")
    gain = {
        d: (s - start) / (full - start) for d, s in zip(dimensions, scores, strict=True)
    }
    enough = share - 1e-9  # 0.36 / 0.4 is a little less than 0.9
    return min((d for d in dimensions if gain[d] >= enough), default=None)
