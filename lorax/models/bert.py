"""BERT: the model of `roberta`, under BERT's names on disk."""

from lorax.models import roberta

Config = roberta.Config
Model = roberta.Model
entries = roberta.entries

ALIASES = (
    (r"(embeddings|encoder|pooler)\.", r"bert.\1."),
    (r"(.*)\.gamma$", r"\1.weight"),
    (r"(.*)\.beta$", r"\1.bias"),
)
"""Older names on disk, as `(regex of a prefix, replacement)`."""

HEADS = ("classifier_.*",)
"""Paths of what a checkpoint may lack and `interop.hf.load` then draws."""

IGNORED = (
    r".*\.position_ids",
    r"bert\.pooler\..*",
    r"cls\.(predictions|seq_relationship)\..*",
    r"classifier\..*",
)
"""What this model may leave on disk: buffers, copies of the embedding, and the heads
that were not chosen."""
