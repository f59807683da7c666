"""How much data.

    python run.py --config=experiments/ablations/data_size.py
    python run.py --config=experiments/ablations/data_size.py:budget=smoke --workdir=runs/data_size-smoke

Question: with the same number of steps, what do fewer examples, seen more often, cost? Each run is 30 steps of 16
sentences (experiments/lora.py), compared on held-out validation sentences, over three seeds. Measured figures are in
docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    return sweeps.base_of(arg, "lora")


def get_cells(config):
    return sweeps.grid(config, {"task.train_limit": (50, 200, 800, 3200, 9579)})
