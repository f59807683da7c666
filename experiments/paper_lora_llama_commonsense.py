"""LLM-Adapters' LLaMA-7B with LoRA on its 170k commonsense questions.

    python run.py --config=experiments/paper_lora_llama_commonsense.py

Paper: Hu et al. 2023, arXiv:2304.01933. Number: not run here; it needs LLaMA-7B's weights from the Hub, the paper's
commonsense_170k.json (github.com/AGI-Edgerunners/LLM-Adapters) in data and a GPU.

Trainable: 56,098,816 of 6,794,514,432 (tests/test_paper_experiments.py): 32 layers x 32 x (3 x (4096 + 4096) + 2 x
(4096 + 11008)); that is 0.8257 %, and 0.8325 % of the base alone: the paper's 0.83 either way.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="llama-7b", task="data/commonsense_170k.json"))
    config.task.update(prompt_column="instruction", completion_column="output", prompt_template="{prompt}\n",
                       validation_fraction=0.001)
    config.method.update(r=32, lora_alpha=64, lora_dropout=0.05,
                         target_modules=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"))
    config.model.update(dtype="bfloat16", param_dtype="bfloat16", remat=True)
    config.data.update(batch_size=16, max_length=256, on_too_long="drop")
    config.optim.update(learning_rate=3e-4, schedule="linear", epochs=3.0)
    config.eval.probe = ""
    return config
