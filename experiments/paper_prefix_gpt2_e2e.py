"""The prefix-tuning paper's GPT-2 medium on E2E NLG, as far as this library can express it.

    python run.py --config=experiments/paper_prefix_gpt2_e2e.py

Paper: Li and Liang 2021, arXiv:2101.00190, table 1: a prefix of 5, 5 epochs, batches of 10, a rate of 8e-5 that falls
linearly; the network's 512 units are its code's (github.com/XiangLi1999/PrefixTuning, gpt2/train_e2e.py). Number: not
run here; it needs GPT-2 medium from the Hub, the E2E files (github.com/tuetschek/e2e-dataset) in data/e2e and a GPU;
the script that computes BLEU there is not part of this repository. Difference: the paper's code writes these files'
tables as text in a way of its own.

Trainable: 25,744,896 (tests/test_paper_experiments.py), as peft counts it: the network P = W tanh(V e + c) + b, whose
e is 5 x 1024, V 1024 x 512, and W 512 x 49,152, one key and one value of 1024 in each of 24 layers. The paper prints
0.1 %, which is what is stored, without W and V: 5 x 24 x 2 x 1024 = 245,760, or 0.07 % of 354,823,168. With
--config.method.prefix_projection=False just these train.
"""

from experiments import paper_lora_gpt2_e2e


def get_config(arg: str = ""):
    config = paper_lora_gpt2_e2e.get_config(arg, method="prefix")
    config.method.update(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=512)
    config.data.batch_size = 10
    config.optim.update(learning_rate=8e-5, weight_decay=0.0, warmup_ratio=0.0)
    return config
