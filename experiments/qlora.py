"""QLoRA: LoRA on all linear layers of a base in four bits.

    python run.py --config=experiments/qlora.py
    python run.py --config=experiments/qlora.py:model=llama3_70b --mode=plan

Paper: Dettmers et al. 2023, arXiv:2305.14314: NF4 in blocks of 64, double quantisation, bfloat16 compute, gradient
checkpointing, adapters on every linear layer. r 16, alpha 32 and dropout 0.05 are the source article's.
Number: not measured yet.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="quantize+lora")
    config.model.update(dtype="bfloat16", param_dtype="bfloat16", remat=True)
    config.method.quantize.update(quant_type="nf4", block_size=64, double_quant=True)
    config.method.lora.update(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
