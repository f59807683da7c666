"""IA3: 0.04 % of the parameters, a high learning rate.

    python run.py --config=experiments/ia3.py

Paper: Liu et al. 2022, arXiv:2205.05638 (learning rate 3e-3 there). Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="ia3")
    config.optim.update(learning_rate=3e-3, steps=60)
    return config
