"""LoKr: the update is a Kronecker product, of full rank with few parameters.

    python run.py --config=experiments/lokr.py

Paper: Edalati et al. 2022, arXiv:2212.10650; with factors of factors Yeh et al. 2023, arXiv:2309.14859. Number:
accuracy among the five words 0.400 → 0.300, rank correlation 0.636 → 0.653, in 15 steps and on 40 sentences (LOG.md,
2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="lokr")
    config.method.update(r=8, alpha=16)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
