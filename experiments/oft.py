"""OFT: the inputs of a module are rotated. Rotation keeps their lengths and angles.

    python run.py --config=experiments/oft.py

Paper: Qiu et al. 2023, arXiv:2306.07280; rotating the inputs, with a series for the inverse, Qiu et al. 2025,
arXiv:2506.19847. Number: accuracy among the five words 0.400 → 0.550, rank correlation 0.636 → 0.680, in 15 steps and
on 40 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="oft")
    config.method.update(oft_block_size=32)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
