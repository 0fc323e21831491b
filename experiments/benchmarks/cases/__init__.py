"""lorax's programs to time, their sizes, and what XLA says they cost."""
