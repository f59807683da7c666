"""What a model does: held-out losses, metrics, text that it writes, and how long it takes."""
