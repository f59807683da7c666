"""LoHa: an update of rank up to r^2 at the size of a LoRA of rank 2 r.

    python run.py --config=experiments/loha.py

Paper: Hyeon-Woo et al. 2021, arXiv:2108.06098; as an adapter Yeh et al. 2023, arXiv:2309.14859.
Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="loha")
    config.method.update(r=8, alpha=16)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
