"""How many virtual tokens.

    python run.py --config=experiments/ablations/prefix_length.py
    python run.py --config=experiments/ablations/prefix_length.py:budget=smoke --workdir=runs/prefix_length-smoke

Question: when does a longer prefix stop helping? Li and Liang 2021 (arXiv:2101.00190, section 7.2) find 10 best for
table-to-text and 200 for summaries. Each run is 30 steps of 16 sentences (experiments/prefix.py), compared on
held-out validation sentences, over three seeds. Measured figures are in docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    return sweeps.base_of(arg, "prefix")


def get_cells(config):
    return sweeps.grid(config, {"method.num_virtual_tokens": (5, 10, 20, 40, 80)})
