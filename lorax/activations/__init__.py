"""Statistics of the activations that adapted kernels read, for inits that need them."""

from lorax.activations.components import covariances, decomposed, principal
from lorax.activations.probes import observed

__all__ = ["covariances", "decomposed", "observed", "principal"]
