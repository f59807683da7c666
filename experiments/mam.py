"""Mix-and-match (MAM): prefix tuning and a parallel adapter at the feed-forward part, both at once.

    python run.py --config=experiments/mam.py --config.method.prefix.num_virtual_tokens=30

Paper: He et al. 2022, arXiv:2110.04366, section 4.6. It has a prefix of 30 and a bottleneck of 512 at width 1024; here
the bottleneck is at most 288 of 576. Number: accuracy among the five words 0.225 → 0.325, rank correlation 0.488 →
-0.304, general text 6.480 → 16.454, in 15 steps and on 40 sentences: so short a run forgets too much (LOG.md,
2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"),
                             method="prefix+parallel_adapter")
    config.method.prefix.num_virtual_tokens = 30
    config.optim.update(learning_rate=2e-4, steps=60)
    return config
