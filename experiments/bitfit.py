"""BitFit: only biases train. SmolLM2 has none, so its kernels get new ones, which cannot be merged.

    python run.py --config=experiments/bitfit.py
    python run.py --config=experiments/bitfit.py:model=qwen2.5-0.5b --config.method.add_missing=False

Paper: Ben Zaken et al. 2021, arXiv:2106.10199, with learning rates from 1e-4 to 1e-3. Number: accuracy among the five
words 0.370 → 0.450, rank correlation 0.714 → 0.697, with --config.optim.learning_rate=0.003, in 30 steps and on 100
sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="bitfit")
    config.method.add_missing = True
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
