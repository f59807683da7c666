"""LoRA on a small encoder: a classifier of movie reviews with a head of its own.

    python run.py --config=experiments/minilm_lora.py

Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="minilm-l6", task="movie_classes"))
    config.task.pooling = "mean"
    config.method.update(r=8, lora_alpha=16, target_modules=("query", "value"), modules_to_save=("classifier",))
    config.data.update(batch_size=32, collate="pack")
    config.optim.update(learning_rate=1e-3, steps=38)
    config.eval.probe = ""
    return config
