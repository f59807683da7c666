"""LoRA, what it may start from, its variants, and several LoRAs at once."""
