"""The factor updates whose product is closest to a gradient of the whole kernel.

For `W = W0 + s A B`, gradient G of W and `gA = s G B^T`, `gB = s A^T G`, the minimisers
of `|s (hA B + A hB) - G|` are, for any r x r matrix X,

    hA = gA M^-1 / s^2                  + A X
    hB = N^-1 (gB - K M^-1 B) / s^2     - X B,        K = A^T gA = gB B^T

and `s (hA B + A hB)` is the orthogonal projection of G onto the tangent space of the
rank-r matrices at A B. This needs only gA, gB and r x r algebra, never G. With the
spectra `N = U diag(n) U^T`, `M = V diag(m) V^T` and `K' = U^T K V`,

    s^2 X = -U (K' / c) V^T,    c_ij = m_j (n_i + m_j)    sylvester
                                     = 2 n_i m_j          symmetry
                                     = infinity           zero

References:
  Wang et al., LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, arXiv:2407.18242.
  Su Jianlin, kexue.fm/archives/10266, for the symmetric choice of X.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from lorax import _checks, linalg
from lorax.optim import _gram, _pairs

CHOICES = ("sylvester", "symmetry", "zero")


class Solution(NamedTuple):
    """Which of the equivalent factor updates to take.

    Attributes:
      x: "sylvester": hA, hB as close as possible to gA, gB (the paper's); "symmetry":
        hA B and A hB as close as possible to each other; "zero".
      damping: damping of N and M, see `_gram.damping_of`.
      relative: False for absolute damping.
    """

    x: str
    damping: _checks.Number
    relative: bool = True

    def checked(self) -> Solution:
        """Returns itself; ValueError for an unknown `x` or negative damping."""
        _checks.one_of("x", self.x, CHOICES)
        _checks.at_least("damping", self.damping)
        return self


def project(
    update: _pairs.Pair, given: _pairs.Pair, solution: Solution
) -> tuple[jax.Array, jax.Array]:
    """Returns `hA: [n, in, rank]` and `hB: [n, rank, out]`.

    A Gram matrix that is singular and undamped is replaced by its pseudo-inverse: at
    B = 0, hA = 0 and `hB = N^-1 gB / s^2`.

    Args:
      update: gA and gB.
      given: A and B, with the scale and the true rank.
      solution: which hA and hB to take, and how to damp N and M.
    """
    dot, inverse, x = linalg.dot, _gram.reciprocal, solution.x
    n, m = _gram.spectra(given, solution.damping, solution.relative)
    u, v = n.vectors, m.vectors
    rows, columns = inverse(n.values)[..., None], inverse(m.values)[..., None, :]
    basis, cobasis = dot(given.a, u), dot(v.mT, given.b)  # AU, V^T B
    ga, gb = dot(update.a, v), dot(u.mT, update.b)  # gA V, U^T gB
    cross = dot(basis.mT, ga)  # K'
    if x == "sylvester":
        total = n.values[..., None] + m.values[..., None, :]
        both = inverse(total.reshape(len(total), -1)).reshape(total.shape)
        free = -cross * columns * both
    else:
        free = -cross * rows * columns * (0.5 if x == "symmetry" else 0.0)
    ha = dot(ga * columns + dot(basis, free), v.mT)
    hb = dot(u, gb * rows - dot(cross * rows * columns + free, cobasis))
    square = given.scale**2
    return _gram.true_rank_only(ha / square, hb / square, given.rank)
