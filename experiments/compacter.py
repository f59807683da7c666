"""Compacter: Houlsby's adapters from Kronecker products, a fraction of the parameters.

    python run.py --config=experiments/compacter.py

Paper: Karimi Mahabadi et al. 2021, arXiv:2106.04647 (learning rate 3e-3 there). Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="compacter")
    config.method.update(bottleneck_size=24)
    config.optim.update(learning_rate=3e-3, steps=60)
    return config
