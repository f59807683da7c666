"""AdaLoRA: its leaves and forward pass, and how it shares out its ranks."""
