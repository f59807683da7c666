"""LayerNorm tuning: the norms' scales alone train, 0.03 % of the parameters.

    python run.py --config=experiments/ln_tuning.py

Paper: Zhao et al. 2023, arXiv:2312.11420. Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="ln_tuning")
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
