"""Other libraries' files: checkpoints and adapters, read and written."""
