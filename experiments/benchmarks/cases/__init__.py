"""Programs of ours to be timed, their sizes, and what XLA says they cost."""
