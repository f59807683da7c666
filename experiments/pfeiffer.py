"""Pfeiffer adapters: one a layer, half of Houlsby's.

    python run.py --config=experiments/pfeiffer.py

Paper: Pfeiffer et al. 2020, arXiv:2005.00247 (learning rate 1e-4 there). Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="pfeiffer")
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
