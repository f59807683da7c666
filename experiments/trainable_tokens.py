"""Trainable tokens: only the embeddings of the five answer words train, in the head too, which is tied to them.

    python run.py --config=experiments/trainable_tokens.py

The ids are SmolLM2's, of " terrible", " bad", " okay", " good" and " great"; for another model give its own:
--config.method.token_indices=1,2,3. Paper: none; it is Hugging Face peft's TRAINABLE_TOKENS. Number: accuracy among
the five words 0.400 → 0.400, rank correlation 0.636 → 0.737, in 15 steps and on 40 sentences (LOG.md, 2026-11-24;
float32, 2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"),
                             method="trainable_tokens")
    config.method.token_indices = (13321, 3309, 14867, 1123, 1109)
    config.optim.update(learning_rate=1e-2, steps=60)
    return config
