"""rsLoRA: the scale alpha / sqrt(r) keeps the update's size at high ranks.

    python run.py --config=experiments/rslora.py

Paper: Kalajdzievski 2023, arXiv:2312.03732. Number: accuracy among the five words 0.400 → 0.400, rank correlation
0.636 → 0.692, in 15 steps and on 40 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"))
    config.method.update(r=64, lora_alpha=16, lora_dropout=0.1, use_rslora=True)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
