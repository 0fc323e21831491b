"""What adapters learned: pure functions on adapter trees, usable as metrics.

Each module lists its references; `experiments/studies/` uses these functions. As in
`lorax.optim`, modules with a leading underscore are private.
"""

from lorax.analysis._amplification import Amplification, amplification
from lorax.analysis._cost import Cost, Costs, cost
from lorax.analysis._intrinsic import (
    RandomSubspace,
    intrinsic_dimension,
    random_subspace,
)
from lorax.analysis._intruders import Intruders, intruder_dimensions
from lorax.analysis._maps import LayerMap, layer_map
from lorax.analysis._operations import operations
from lorax.analysis._spectrum import (
    effective_rank,
    energy,
    metrics,
    singular_values,
    stable_rank,
)
from lorax.analysis._subspace import random_similarity, subspace_similarity

__all__ = [
    "Amplification",
    "Cost",
    "Costs",
    "Intruders",
    "LayerMap",
    "RandomSubspace",
    "amplification",
    "cost",
    "effective_rank",
    "energy",
    "intrinsic_dimension",
    "intruder_dimensions",
    "layer_map",
    "metrics",
    "operations",
    "random_similarity",
    "random_subspace",
    "singular_values",
    "stable_rank",
    "subspace_similarity",
]
