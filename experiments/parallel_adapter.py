"""Scaled parallel adapters beside the feed-forward part.

    python run.py --config=experiments/parallel_adapter.py

Paper: He et al. 2022, arXiv:2110.04366 (bottleneck 512, s = 4, learning rate 5e-5 there). Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"),
                             method="parallel_adapter")
    config.method.update(bottleneck_size=64)
    config.optim.update(learning_rate=2e-4, steps=60)
    return config
