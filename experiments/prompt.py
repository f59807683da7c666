"""Prompt tuning: twenty trained embeddings in front of the input, and nothing else.

    python run.py --config=experiments/prompt.py

Paper: Lester et al. 2021, arXiv:2104.08691, whose starts from embeddings of the vocabulary are best after class
labels, and whose learning rate of 0.3 (Adafactor, T5) is high too. Number: 0.360 → 0.460 among the five words, rank
correlation 0.712 → 0.741, with --config.optim.learning_rate=0.01 and 30 steps, 100 sentences (LOG.md, 2026-11-24;
float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="prompt")
    config.method.update(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB")
    config.optim.update(learning_rate=1e-2, steps=60)
    return config
