"""LoRA on a small encoder: a classifier of movie reviews with a head of its own.

    python run.py --config=experiments/minilm_lora.py
    python run.py --config=experiments/minilm_lora.py:task=movie_score      # the rating itself, by regression

Claim: 75,653 trained parameters (0.33 %), the classifier among them, order reviews better after 38 steps of 32 than any
linear classifier of the frozen model's embeddings.
Hardware: PLACEHOLDER
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="minilm-l6", task="movie_classes"))
    config.task.pooling = "mean"
    config.method.update(r=8, lora_alpha=16, target_modules=("query", "value"), modules_to_save=("classifier",))
    config.data.batch_size = 32
    config.optim.update(learning_rate=5e-3, steps=38)
    config.eval.probe = ""
    return config
