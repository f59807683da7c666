"""The type of a quantised base, before LoRA and after it.

    python run.py --config=experiments/ablations/quantisation.py
    python run.py --config=experiments/ablations/quantisation.py:budget=smoke --workdir=runs/quantisation-smoke
    python run.py --config=experiments/ablations/quantisation.py --workdir=runs/b32 \
        --config.method.quantize.block_size=32

Question: what does each code of the base cost, and does LoRA on all linear layers win it back? Dettmers et al. 2023
(arXiv:2305.14314, table 2) rank NF4 with double quantisation before FP4 before Int4 by perplexity before training;
the row "lora" is the same on the base in float32. Each run is 30 steps of 16 sentences (experiments/qlora.py, float32
computation), compared on held-out validation sentences, over three seeds. Measured figures are in docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    config = sweeps.base_of(arg, "qlora")
    config.eval.before = True
    return config


def get_cells(config):
    plain = sweeps.as_experiment(config, "lora")
    plain.method.update(config.method.lora.to_dict())
    plain.optim.learning_rate = config.optim.learning_rate
    return [*sweeps.grid(plain, {}, "lora"),
            *sweeps.grid(config, {"method.quantize.quant_type": ("nf4", "fp4", "int4", "int4_affine", "int8"),
                                  "method.quantize.double_quant": (False, True)}, "qlora")]
