"""How much the seed alone changes.

    python run.py --config=experiments/ablations/seeds.py
    python run.py --config=experiments/ablations/seeds.py:budget=smoke --workdir=runs/seeds-smoke

Question: which differences between methods are larger than those between seeds of one? Each run is 30 steps of 16
sentences (experiments/lora.py), compared on held-out validation sentences, with eight seeds. Measured figures are in
docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    config = sweeps.base_of(arg, "lora")
    config.sweep.seeds = tuple(range(8)) if len(config.sweep.seeds) > 1 else (0, 1)  # one: the smoke budget
    return config


def get_cells(config):
    return sweeps.grid(config, {})
