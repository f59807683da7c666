"""Prompt tuning: twenty embeddings in front of the input train, and nothing else.

    python run.py --config=experiments/prompt.py

Paper: Lester et al. 2021, arXiv:2104.08691, where starts from class labels are best and starts from embeddings of the
vocabulary second. Its learning rate of 0.3 (Adafactor, T5) is high, too. Number: accuracy among the five words 0.360 →
0.460, rank correlation 0.712 → 0.741, with --config.optim.learning_rate=0.01, in 30 steps and on 100 sentences
(LOG.md, 2026-11-24; float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="prompt")
    config.method.update(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB")
    config.optim.update(learning_rate=1e-2, steps=60)
    return config
