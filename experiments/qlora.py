"""QLoRA: LoRA on all linear layers of a base in four bits.

    python run.py --config=experiments/qlora.py
    python run.py --config=experiments/qlora.py:model=llama3_70b --mode=plan

Paper: Dettmers et al. 2023, arXiv:2305.14314: NF4 in blocks of 64, double quantisation, bfloat16 compute, gradient
checkpointing, adapters on every linear layer. r 16, alpha 32 and dropout 0.05 are those of the article "Full
Fine-Tuning vs PEFT".
Number: exact 0.005 -> 0.565, among the five words 0.405 -> 0.550, Spearman 0.639 -> 0.731, loss 8.175 -> 0.542,
general text 4.892 -> 6.595 (200 held-out sentences, seed 0). Without quantisation the base has 0.430 among the five,
Spearman 0.688 and general text 4.654. Training took 6 min 14 s on 2 cores of an AMD EPYC, shared with other work.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="smollm2-135m", task="movie_rating"), method="quantize+lora")
    config.model.update(dtype="bfloat16", param_dtype="bfloat16", remat=True)
    config.method.quantize.update(quant_type="nf4", block_size=64, double_quant=True)
    config.method.lora.update(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    config.optim.update(learning_rate=1e-3, steps=60)
    return config
