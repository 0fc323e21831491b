"""Losses: the protocol of a train step, and losses that never hold all their logits."""

from lorax.losses import preferences
from lorax.losses.contrastive import in_batch_negatives
from lorax.losses.cross_entropy import (
    CrossEntropy,
    chunked_cross_entropy,
    token_log_probs,
)
from lorax.losses.distillation import Divergence, Predictions, chunked_divergence
from lorax.losses.heads import Head, chunk_of
from lorax.losses.protocol import (
    RESERVED,
    LossFn,
    Metrics,
    Reference,
    cast,
    checked,
    simple_loss,
)

__all__ = [
    "RESERVED",
    "CrossEntropy",
    "Divergence",
    "Head",
    "LossFn",
    "Metrics",
    "Predictions",
    "Reference",
    "cast",
    "checked",
    "chunk_of",
    "chunked_cross_entropy",
    "chunked_divergence",
    "in_batch_negatives",
    "preferences",
    "simple_loss",
    "token_log_probs",
]
