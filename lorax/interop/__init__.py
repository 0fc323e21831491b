"""Other people's files: Hugging Face checkpoints and PEFT adapters."""
