"""MiSS: shards of a module's inputs share one small matrix, which costs half of a LoRA of the same rank.

    python run.py --config=experiments/miss.py

Paper: Kang and Yin 2024, arXiv:2409.15371. Number: exact 0 → 0.520, accuracy among the five words 0.430 → 0.520, rank
correlation 0.688 → 0.751 (200 held-out sentences, 60 steps, seed 0; float32, 2 CPU cores, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="miss")
    config.method.update(r=16)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
