"""SigLIP's vision tower: the model of `vit`, under SigLIP's names on disk."""

from lorax.models import vit

Config = vit.Config
Model = vit.Model
entries = vit.entries
example = vit.example
HEADS = vit.HEADS

ALIASES = ((r"(embeddings|encoder|post_layernorm|head)\.", r"vision_model.\1."),)
"""Names on disk of a stand-alone tower, as `(regex of a prefix, replacement)`."""

IGNORED = (
    r".*\.position_ids",
    r"text_model\..*",
    r"logit_(scale|bias)",
    r"vision_model\.head\..*",
    r"classifier\..*",
)
"""What this model may leave unread: buffers, the text tower and what compares the two,
and the heads that were not chosen."""
