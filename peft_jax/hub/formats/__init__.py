"""File formats of checkpoints: safetensors, GGUF, bitsandbytes' four bits."""
