"""LoRA-FA: A stays as it began, half the parameters of LoRA or less train.

    python run.py --config=experiments/lorafa.py

Paper: Zhang et al. 2023, arXiv:2308.03303. Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="lorafa")
    config.method.update(r=16, lora_alpha=32, lora_dropout=0.1)
    config.optim.update(learning_rate=2e-3, steps=60)
    return config
