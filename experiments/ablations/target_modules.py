"""Which modules LoRA changes.

    python run.py --config=experiments/ablations/target_modules.py
    python run.py --config=experiments/ablations/target_modules.py:budget=smoke --workdir=runs/target_modules-smoke

Question: are the attention's projections enough? Dettmers et al. 2023 (arXiv:2305.14314, figure 2) need all linear
layers to reach full fine-tuning; Hu et al. 2021 (arXiv:2106.09685, table 5) spread a fixed budget over q and v. Each
run is 30 steps of 16 sentences (experiments/lora.py), compared on held-out validation sentences, over three seeds.
Measured figures are in docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    return sweeps.base_of(arg, "lora")


def get_cells(config):
    return sweeps.grid(config, {"method.target_modules": (
        ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"),
        "all-linear",
    )})
