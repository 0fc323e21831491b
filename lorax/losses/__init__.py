"""Losses: what a train step takes, and cross-entropy that never holds its logits."""

from lorax.losses.contrastive import in_batch_negatives
from lorax.losses.cross_entropy import (
    CrossEntropy,
    Head,
    chunk_of,
    chunked_cross_entropy,
    token_log_probs,
)
from lorax.losses.protocol import (
    RESERVED,
    LossFn,
    Metrics,
    cast,
    checked,
    simple_loss,
)

__all__ = [
    "RESERVED",
    "CrossEntropy",
    "Head",
    "LossFn",
    "Metrics",
    "cast",
    "checked",
    "chunk_of",
    "chunked_cross_entropy",
    "in_batch_negatives",
    "simple_loss",
    "token_log_probs",
]
