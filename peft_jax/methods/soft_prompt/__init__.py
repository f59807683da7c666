"""Methods that put virtual tokens in front of every row: prefix, prompt and P-tuning."""
