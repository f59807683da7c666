"""Houlsby adapters in RoBERTa large on SST-2 of GLUE, the small "Adpt H" row of the LoRA paper.

    python run.py --config=experiments/paper_houlsby_roberta_sst2.py

Paper: Houlsby et al. 2019, arXiv:1902.00751; the row is of Hu et al. 2021, arXiv:2106.09685, table 2. Number: not run
here; it needs the model and the data of the Hub and a GPU. Difference: transformers' dropout in the frozen model is
left out; the first paper also trains the layer norms.

Trainable: 1,887,618 (tests/test_paper_experiments.py): 835,968 in the adapters, 24 layers x 2 x (2 x 1024 x 8 + 8 +
1024), which the paper prints as 0.8 M, and 1,051,650 in the classifier's two layers, which it leaves out.
"""

from configs import base, parse


def get_config(arg: str = ""):
    given = parse.typed_args(arg, model="roberta-large", task="hub")
    config = base.get_config(**given, method="houlsby")
    config.task.update(source="nyu-mll/glue", subset="sst2", validation_split="validation", text_column="sentence",
                       label_column="label", answer="class", num_labels=2)
    config.method.update(bottleneck_size=8, attention_modules=("attention.output.dense",),
                         output_modules=("output.dense",), modules_to_save=("classifier",))
    config.data.update(batch_size=32, max_length=128, on_too_long="truncate_left")
    config.optim.update(learning_rate=2e-4, schedule="linear", warmup_ratio=0.06, epochs=5.0)
    config.eval.update(probe="", limit=0)
    return config
