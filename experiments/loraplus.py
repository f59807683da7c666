"""LoRA+: B learns 16 times faster than A. The rest is experiments/lora.py with a lower rate.

    python run.py --config=experiments/loraplus.py

Paper: Hayou et al. 2024, arXiv:2402.12354, with a ratio of 16. Number: accuracy among the five words 0.400 → 0.500,
rank correlation 0.636 → 0.649, in 15 steps and on 40 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC,
no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="loraplus")
    config.method.update(r=16, lora_alpha=32, lora_dropout=0.1)
    config.optim.update(learning_rate=2e-4, steps=60, rates={"lora_b": 16.0})
    return config
