"""The type of a quantised base under LoRA.

    python run.py --config=experiments/ablations/quantisation.py
    python run.py --config=experiments/ablations/quantisation.py:budget=smoke --workdir=runs/quantisation-smoke

Question: what does each code of the base cost once LoRA on all linear layers has been trained on it? Dettmers et al.
2023 (arXiv:2305.14314, table 2) rank NF4 with double quantisation before FP4 before Int4 by perplexity before training.
Each run is 30 steps of 16 sentences (experiments/qlora.py, float32 computation), compared on held-out validation
sentences, over three seeds; what the codes alone cost is experiments/ablations/quant.py's.
Measured figures are in docs/findings.md, as far as they have been taken.
"""

from configs import sweeps


def get_config(arg: str = ""):
    return sweeps.base_of(arg, "qlora")


def get_cells(config):
    return sweeps.grid(config, {"method.quantize.quant_type": ("nf4", "fp4", "int4", "int4_affine", "int8"),
                                "method.quantize.double_quant": (False, True)}, "qlora")
