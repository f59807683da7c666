"""The width of Houlsby's adapters.

    python run.py --config=experiments/ablations/bottleneck.py
    python run.py --config=experiments/ablations/bottleneck.py:budget=smoke --workdir=runs/bottleneck-smoke

Question: how small may the bottleneck be? Houlsby et al. 2019 (arXiv:1902.00751, section 3.6) find 8 to 256 alike.
Each run is 30 steps of 16 sentences (experiments/adapter.py), compared on held-out validation sentences, over three
seeds. Measured figures are in docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    return sweeps.base_of(arg, "adapter")


def get_cells(config):
    return sweeps.grid(config, {"method.bottleneck_size": (4, 16, 64, 256)})
