"""IA3: 0.04 % of the parameters train, at a high learning rate.

    python run.py --config=experiments/ia3.py

Paper: Liu et al. 2022, arXiv:2205.05638, with a learning rate of 3e-3. Number: accuracy among the five words 0.370 →
0.490, rank correlation 0.714 → 0.711, with --config.optim.learning_rate=0.01, in 30 steps and on 100 sentences
(LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="ia3")
    config.optim.update(learning_rate=3e-3, steps=60)
    return config
