"""The inner loop and what it needs: optimisers, metrics, checkpoints, the guard."""
