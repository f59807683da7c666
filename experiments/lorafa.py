"""LoRA-FA: A stays as it began, so at most half of LoRA's parameters train.

    python run.py --config=experiments/lorafa.py

Paper: Zhang et al. 2023, arXiv:2308.03303. Number: accuracy among the five words 0.400 → 0.325, rank correlation 0.636
→ 0.612, in 15 steps and on 40 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="lorafa")
    config.method.update(r=16, lora_alpha=32, lora_dropout=0.1)
    config.optim.update(learning_rate=2e-3, steps=60)
    return config
