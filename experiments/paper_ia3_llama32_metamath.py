"""peft's own comparison, the row of IA3: Llama-3.2-3B on MetaMathQA.

    python run.py --config=experiments/paper_ia3_llama32_metamath.py

Source: github.com/huggingface/peft, method_comparison/MetaMathQA, which tests on GSM8K. Number: not run here; it needs
the model and the data of the Hub and a GPU.

Trainable: 286,720 (tests/test_paper_experiments.py), peft's number: 28 layers x (1024 keys + 1024 values + 8192 inputs
of down_proj).
"""

from experiments import paper_lora_llama32_metamath


def get_config(arg: str = ""):
    return paper_lora_llama32_metamath.get_config(arg, method="ia3")
