"""The LoRA paper's GPT-2 medium on E2E NLG, as far as this library can express it.

    python run.py --config=experiments/paper_lora_gpt2_e2e.py

Paper: Hu et al. 2021, arXiv:2106.09685, tables 3 and 11. Number: not run here; it needs GPT-2 medium from the Hub, the
E2E files (github.com/tuetschek/e2e-dataset) in data/e2e and a GPU; the script that computes BLEU there is not part of
this repository.
Differences: the paper smooths labels (0.1), and here they are not smoothed. It warms up for 500 steps, here for the
same part of the run.

Trainable: 393,216 (tests/test_paper_experiments.py). The paper adapts q and v, two products of rank 4 inside the fused
c_attn: 24 layers x 2 x 4 x (1024 + 1024). peft, and we, put one product of rank 4 on all of c_attn, k included:
24 x 4 x (1024 + 3072), the same number by chance. The paper prints 0.35 M, which this closed form does not give.
"""

from configs import base, parse


def get_config(arg: str = "", method: str = "lora"):
    config = base.get_config(**parse.typed_args(arg, model="gpt2-medium", task="file"), method=method)
    config.task.update(source="data/e2e/trainset.csv", validation_source="data/e2e/devset.csv", prompt_column="mr",
                       completion_column="ref", completion_template=" {completion}")
    if method == "lora":
        config.method.update(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=("c_attn",))
    config.data.batch_size = 8
    config.optim.update(learning_rate=2e-4, schedule="linear", warmup_ratio=0.02, weight_decay=0.01, epochs=5.0)
    config.eval.probe = ""
    return config
