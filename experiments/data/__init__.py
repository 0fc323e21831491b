"""Input pipelines: documents in, batches of byte windows out."""
