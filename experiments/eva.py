"""EVA: A begins as the principal directions of the inputs; a module whose inputs need more of them gets more rank.

    python run.py --config=experiments/eva.py

Paper: Paischer et al. 2024, arXiv:2410.07170. Number: accuracy among the five words 0.400 → 0.475, rank correlation
0.636 → 0.710, in 15 steps and on 40 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"))
    config.method.update(r=16, lora_alpha=32, lora_dropout=0.1, init_lora_weights="eva")
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
