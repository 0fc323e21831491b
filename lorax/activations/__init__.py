"""Statistics of what adapted kernels read, for the inits that ask for them."""

from lorax.activations.components import covariances, decomposed, principal
from lorax.activations.probes import observed

__all__ = ["covariances", "decomposed", "observed", "principal"]
