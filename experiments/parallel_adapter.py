"""Scaled parallel adapters beside the feed-forward part.

    python run.py --config=experiments/parallel_adapter.py

Paper: He et al. 2022, arXiv:2110.04366, with a bottleneck of 512, s = 4 and a learning rate of 5e-5. Number: accuracy
among the five words 0.400 → 0.350, rank correlation 0.636 → 0.552, general text 4.924 → 10.688, in 15 steps and on 40
sentences: so short a run forgets too much (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"),
                             method="parallel_adapter")
    config.method.update(bottleneck_size=64)
    config.optim.update(learning_rate=2e-4, steps=60)
    return config
