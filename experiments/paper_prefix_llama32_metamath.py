"""peft's own comparison, the row of prefix tuning with 200 tokens: Llama-3.2-3B on MetaMathQA.

    python run.py --config=experiments/paper_prefix_llama32_metamath.py

Source: github.com/huggingface/peft, method_comparison/MetaMathQA, which tests on GSM8K. Number: not run here; it needs
the model and the data of the Hub and a GPU.

Trainable: 11,468,800 (tests/test_paper_experiments.py), peft's number: 28 layers x 200 tokens x (1024 keys + 1024
values); with --config.method.num_virtual_tokens=50 it is 2,867,200.
"""

from experiments import paper_lora_llama32_metamath


def get_config(arg: str = ""):
    config = paper_lora_llama32_metamath.get_config(arg, method="prefix")
    config.method.num_virtual_tokens = 200
    config.optim.learning_rate = 1e-3
    return config
