"""HRA: the inputs of a module are reflected a few times. The change is orthogonal and of low rank.

    python run.py --config=experiments/hra.py

Paper: Yuan et al. 2024, arXiv:2405.17484, with r = 8. Number: accuracy among the five words 0.400 → 0.325, rank
correlation 0.636 → 0.656, in 15 steps and on 40 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no
GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="hra")
    config.method.update(r=8)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
