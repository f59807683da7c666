"""Houlsby adapters: two small networks in every layer, after attention and after the feed-forward part.

    python run.py --config=experiments/adapter.py

Paper: Houlsby et al. 2019, arXiv:1902.00751, with learning rates of 3e-4 to 3e-3. The bottleneck of 64 is that of the
article "Full Fine-Tuning vs PEFT".
Number: accuracy among the five words 0.370 → 0.480, rank correlation 0.715 → 0.750, with
--config.optim.learning_rate=0.001, in 30 steps and on 100 sentences (LOG.md, 2026-11-24; float32, 2 cores of an AMD
EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="houlsby")
    config.method.update(bottleneck_size=64)
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
