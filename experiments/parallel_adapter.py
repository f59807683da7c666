"""Scaled parallel adapters beside the feed-forward part.

    python run.py --config=experiments/parallel_adapter.py

Paper: He et al. 2022, arXiv:2110.04366 (bottleneck 512, s = 4, learning rate 5e-5 there). Number: 0.400 → 0.350 among
the five words, rank correlation 0.636 → 0.552, general text 4.924 → 10.688: too much for so short a run, 15 steps and
40 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"),
                             method="parallel_adapter")
    config.method.update(bottleneck_size=64)
    config.optim.update(learning_rate=2e-4, steps=60)
    return config
