"""Which layers LoRA changes.

    python run.py --config=experiments/ablations/layers.py
    python run.py --config=experiments/ablations/layers.py:budget=smoke --workdir=runs/layers-smoke

Question: are some thirds of the layers enough? (The model of this ablation has 30.) Each run is 30 steps of 16
sentences (experiments/lora.py), compared on held-out validation sentences, over three seeds. Measured figures are in
docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    return sweeps.base_of(arg, "lora")


def get_cells(config):
    return sweeps.grid(config, {"method.layers_to_transform": (
        tuple(range(10)), tuple(range(10, 20)), tuple(range(20, 30)), tuple(range(30)),
    )})
