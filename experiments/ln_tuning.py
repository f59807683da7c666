"""LayerNorm tuning: only the norms' scales train, 0.03 % of the parameters.

    python run.py --config=experiments/ln_tuning.py

Paper: Zhao et al. 2023, arXiv:2312.11420. Number: accuracy among the five words 0.400 → 0.225, rank correlation 0.636
→ 0.594, in 15 steps and on 40 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="ln_tuning")
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
