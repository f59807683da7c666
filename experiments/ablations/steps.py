"""Four times the steps: does LoRA come closer to full fine-tuning, and does a lower rate then forget less?

    python run.py --config=experiments/ablations/steps.py
    python run.py --config=experiments/ablations/steps.py:budget=smoke --workdir=runs/steps-smoke

Question: in the 30 steps of the comparison LoRA learns less than full fine-tuning and forgets more, at a rate forty
times as high. Is that the method or the budget? LoRA (experiments/lora.py) at two rates and full fine-tuning at the
comparison's rate, each with the budget's steps and with four times as many (a cosine over all of them), compared on
held-out validation sentences, over three seeds. Measured figures are in docs/ablations.md.
"""

from configs import sweeps


def get_config(arg: str = ""):
    return sweeps.base_of(arg, "lora")


def get_cells(config):
    budget = "optim.steps" if config.optim.steps else "optim.epochs"
    few = config.optim[budget.rpartition(".")[2]]
    full = sweeps.as_experiment(config, "full")
    return [*sweeps.grid(config, {"optim.learning_rate": (3e-4, 1e-3), budget: (few, 4 * few)}),
            *sweeps.grid(full, {"optim.learning_rate": (5e-5,), budget: (few, 4 * few)})]
