"""LoRA's rank and alpha.

    python run.py --config=experiments/ablations/rank.py
    python run.py --config=experiments/ablations/rank.py:budget=smoke --workdir=runs/rank-smoke

Question: does more rank learn more, and is it alpha, alpha / r or r that matters? Hu et al. 2021 (arXiv:2106.09685,
section 7.2) find ranks of 1 to 4 enough for q and v of GPT-3. Each run is 30 steps of 16 sentences
(experiments/lora.py), compared on held-out validation sentences, over three seeds. Measured figures are in
docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    return sweeps.base_of(arg, "lora")


def get_cells(config):
    return sweeps.grid(config, {"method.r": (2, 8, 32), "method.lora_alpha": (8, 32, 128)})
