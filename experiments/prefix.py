"""Prefix tuning: twenty trained keys and values in front of every layer's, and nothing else.

    python run.py --config=experiments/prefix.py

Paper: Li and Liang 2021, arXiv:2101.00190. The start is normal with deviation 0.01, as in the source article.
Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="prefix")
    config.method.num_virtual_tokens = 20
    config.optim.update(learning_rate=1e-2, steps=60)
    return config
