"""LoRA's learning rate.

    python run.py --config=experiments/ablations/learning_rate.py
    python run.py --config=experiments/ablations/learning_rate.py:budget=smoke --workdir=runs/learning_rate-smoke

Question: how wide is the range of rates that work, and what do the high ones forget? Each run is 30 steps of 16
sentences (experiments/lora.py), compared on held-out validation sentences, over three seeds. Measured figures are in
docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    return sweeps.base_of(arg, "lora")


def get_cells(config):
    return sweeps.grid(config, {"optim.learning_rate": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)})
