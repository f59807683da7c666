"""peft's own comparison, the row of LoRA r 32: Llama-3.2-3B on MetaMathQA.

    python run.py --config=experiments/paper_lora_llama32_metamath.py

Source: github.com/huggingface/peft, method_comparison/MetaMathQA, which tests on GSM8K. Number: not run here; it needs
the model and the data of the Hub and a GPU.

Trainable: 9,175,040 (tests/test_paper_experiments.py), peft's number: 28 layers x 32 x (3072 + 3072 + 3072 + 1024).
"""

from configs import base, parse


def get_config(arg: str = "", method: str = "lora"):
    config = base.get_config(**parse.typed_args(arg, model="llama-3.2-3b", task="hub"), method=method)
    config.task.update(source="meta-math/MetaMathQA", prompt_column="query", completion_column="response",
                       prompt_template="Question: {prompt} Think step by step.\nAnswer:",
                       completion_template=" {completion}", validation_fraction=0.001)
    if method == "lora":
        config.method.update(r=32, lora_alpha=64, target_modules=("q_proj", "v_proj"))
    config.model.update(dtype="bfloat16", param_dtype="bfloat16")
    config.data.update(batch_size=4, max_length=768, on_too_long="drop")
    config.optim.update(learning_rate=1e-4, weight_decay=0.1, steps=5000)
    config.eval.probe = ""
    return config
