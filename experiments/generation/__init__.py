"""Models that write: loading them, continuing texts, and what goes out of a run."""
