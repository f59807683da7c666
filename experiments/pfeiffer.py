"""Pfeiffer adapters: one in every layer, where Houlsby has two.

    python run.py --config=experiments/pfeiffer.py

Paper: Pfeiffer et al. 2020, arXiv:2005.00247, with a learning rate of 1e-4. Number: accuracy among the five words
0.450 → 0.375, rank correlation 0.692 → 0.665, in 15 steps and on 40 sentences (LOG.md, 2026-11-24; float32, 2 cores of
an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="pfeiffer")
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
