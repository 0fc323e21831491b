"""Images with labels, and how a model sees them."""
