"""DoRA: LoRA changes the direction of a kernel's columns, and their lengths train apart: 0.02 % more parameters.

    python run.py --config=experiments/dora.py

Paper: Liu et al. 2024, arXiv:2402.09353. Number: accuracy among the five words 0.370 → 0.450, rank correlation 0.714 →
0.688, with --config.optim.learning_rate=0.002, in 30 steps and on 100 sentences (LOG.md, 2026-11-24; float32, 2 cores
of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="dora")
    config.method.update(r=16, lora_alpha=32, lora_dropout=0.1)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
