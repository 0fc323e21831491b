"""Algebra over many adapter sets: stacked, routed, combined, resized, extracted.

stacked = compose.stack([french, german])            # for jax.vmap, or per example:
logits  = compose.route(fn)(stacked, index, params, tokens)
both    = compose.combine([french, german], [0.5, 0.5]).adapters
"""

from lorax.compose.combination import combine
from lorax.compose.conversion import negate, resize, scale, to_lora
from lorax.compose.extraction import extract
from lorax.compose.forms import Combined
from lorax.compose.routing import route
from lorax.compose.stacks import stack, switch, unstack

__all__ = [
    "Combined",
    "combine",
    "extract",
    "negate",
    "resize",
    "route",
    "scale",
    "stack",
    "switch",
    "to_lora",
    "unstack",
]
