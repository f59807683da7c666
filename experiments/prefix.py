"""Prefix tuning: twenty keys and values in front of every layer's own train, and nothing else.

    python run.py --config=experiments/prefix.py

Paper: Li and Liang 2021, arXiv:2101.00190. The start is normal with deviation 0.01, as in the article "Full
Fine-Tuning vs PEFT". Number: accuracy among the five words 0.310 → 0.410, rank correlation 0.489 → 0.531, with
--config.optim.learning_rate=0.03, in 30 steps and on 100 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD
EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="prefix")
    config.method.num_virtual_tokens = 20
    config.optim.update(learning_rate=1e-2, steps=60)
    return config
