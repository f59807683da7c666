"""PiSSA: A and B begin as the kernel's largest singular vectors.

    python run.py --config=experiments/pissa.py

Paper: Meng et al. 2024, arXiv:2404.02948. Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"))
    config.method.update(r=16, lora_alpha=16, init_lora_weights="pissa")
    config.optim.update(learning_rate=2e-4, steps=60)
    return config
