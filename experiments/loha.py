"""LoHa: an update of rank up to r^2, with as many parameters as a LoRA of rank 2 r.

    python run.py --config=experiments/loha.py

Paper: Hyeon-Woo et al. 2021, arXiv:2108.06098; as an adapter Yeh et al. 2023, arXiv:2309.14859. Number: accuracy among
the five words 0.400 → 0.375, rank correlation 0.636 → 0.653, in 15 steps and on 40 sentences (LOG.md, 2026-11-24;
float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="loha")
    config.method.update(r=8, alpha=16)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
