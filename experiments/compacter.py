"""Compacter: Houlsby's adapters made of Kronecker products, with a fraction of the parameters.

    python run.py --config=experiments/compacter.py

Paper: Karimi Mahabadi et al. 2021, arXiv:2106.04647, with a learning rate of 3e-3. Number: accuracy among the five
words 0.400 → 0.300, rank correlation 0.636 → 0.692, in 15 steps and on 40 sentences (LOG.md, 2026-11-24; float32, 2
cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="compacter")
    config.method.update(bottleneck_size=24)
    config.optim.update(learning_rate=3e-3, steps=60)
    return config
