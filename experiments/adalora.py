"""AdaLoRA: training cuts a third of the ranks, those that matter least.

    python run.py --config=experiments/adalora.py

Paper: Zhang et al. 2023, arXiv:2303.10512, where init_r is one and a half times target_r. Number: accuracy among the
five words 0.400 → 0.375, rank correlation 0.636 → 0.645, in 15 steps and on 40 sentences (LOG.md, 2026-11-24; float32,
2 cores of an AMD EPYC, no GPU).
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="adalora")
    config.method.update(target_r=8, init_r=12, lora_alpha=32, tinit=10, tfinal=20, orth_reg_weight=0.1)
    config.optim.update(learning_rate=2e-3, steps=60)
    return config
