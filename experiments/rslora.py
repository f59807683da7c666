"""rsLoRA: the scale alpha / sqrt(r) keeps the update's size at high ranks.

    python run.py --config=experiments/rslora.py

Paper: Kalajdzievski 2023, arXiv:2312.03732. Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"))
    config.method.update(r=64, lora_alpha=16, lora_dropout=0.1, use_rslora=True)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
