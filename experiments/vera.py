"""VeRA: two small vectors in each module train, between random projections that all modules share.

    python run.py --config=experiments/vera.py

Paper: Kopiczko et al. 2023, arXiv:2310.11454, with rank 256 and high rates, from 2e-3 to 2e-2. Number: accuracy among
the five words 0.400 → 0.275, rank correlation 0.636 → 0.648, in 15 steps and on 40 sentences (LOG.md, 2026-11-24;
float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="vera")
    config.method.update(r=256)
    config.optim.update(learning_rate=1e-2, steps=60)
    return config
