"""The LoRA paper's RoBERTa base on SST-2 of GLUE.

    python run.py --config=experiments/paper_lora_roberta_sst2.py

Paper: Hu et al. 2021, arXiv:2106.09685, tables 2 and 9. Number: not run here; it needs the model and the data of the
Hub and a GPU. Difference: transformers' dropout in the frozen model is left out.

Trainable: 887,042 (tests/test_paper_experiments.py), which is what peft prints too: 294,912 in LoRA, 12 layers x 2 x 8
x (768 + 768), which the paper rounds to 0.3 M, and 592,130 in the classifier's two layers, which the paper leaves out.
"""

from configs import base, parse


def get_config(arg: str = ""):
    config = base.get_config(**parse.typed_args(arg, model="roberta-base", task="hub"))
    config.task.update(source="nyu-mll/glue", subset="sst2", validation_split="validation", text_column="sentence",
                       label_column="label", answer="class", num_labels=2)
    config.method.update(r=8, lora_alpha=8, target_modules=("query", "value"), modules_to_save=("classifier",))
    config.data.update(batch_size=16, max_length=512)
    config.optim.update(learning_rate=5e-4, schedule="linear", warmup_ratio=0.06, epochs=60.0)
    config.eval.update(probe="", limit=0)
    return config
