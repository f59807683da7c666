"""Houlsby adapters: two small networks in every layer, after attention and after the feed-forward part.

    python run.py --config=experiments/adapter.py

Paper: Houlsby et al. 2019, arXiv:1902.00751 (bottleneck 64 of the source article; learning rate 3e-4 to 3e-3 there).
Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="houlsby")
    config.method.update(bottleneck_size=64)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
