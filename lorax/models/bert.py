"""BERT: the model of `roberta`, under BERT's names on disk."""

from lorax.models import roberta, roberta_config

Config = roberta.Config
Model = roberta.Model
entries = roberta.entries
HEADS = roberta.HEADS
FURTHER = roberta.FURTHER

ALIASES = ((r"(embeddings|encoder|pooler)\.", r"bert.\1."), *roberta_config.OLDER_NORMS)
"""Older names on disk, as `(regex of a prefix, replacement)`."""

IGNORED = (
    r".*\.position_ids",
    r"bert\.pooler\..*",
    r"cls\.(predictions|seq_relationship)\..*",
    r"classifier\..*",
)
"""What this model may leave unread: buffers, copies of the embedding, and the heads
that were not chosen."""
