"""Full fine-tuning against PEFT on one model and one task: what each learns, what it forgets, what it costs.

    python run.py --config=experiments/compare.py:budget=smoke            # that it runs: within 10 minutes on 2 cores
    python run.py --config=experiments/compare.py                         # full, LoRA, QLoRA, Houlsby, prefix: hours
    python run.py --config=experiments/compare.py:methods=all             # and prompt, IA3, BitFit, DoRA
    python run.py --config=experiments/compare.py:methods=lora+vera+oft   # any experiments
    python run.py --config=experiments/compare.py --sweep_index=3         # one cell of it, for a cluster's job array
    python run.py --config=experiments/compare.py --mode=report           # tables and plots of what is there

Question: is the table of the article "Full Fine-Tuning vs PEFT" right? Every method has the same batches, steps and
seeds, in float32. Each has its own learning rate, the best of three or four on validation data. The figures reported
are of test data, over the seeds. A finished run is not run again. Results: runs/compare/results/*.json, table.md,
table.csv, table.json, plots/, report.html. Measured figures are in docs/findings.md.
"""

from pathlib import Path

from configs import base, parse, sweeps
from peft_jax.errors import PeftJaxError, nearest

RATES = {  # the first is tried first; the fourth is beyond the best of three, where that was at their edge
    "full": (5e-5, 2e-4, 2e-5),
    "lora": (1e-3, 2e-3, 5e-4, 4e-3),
    "qlora": (5e-4, 1e-3, 2e-4, 2e-3),
    "adapter": (1e-3, 2e-3, 5e-4, 4e-3),
    "prefix": (3e-2, 1e-1, 1e-2, 3e-3),
    "prompt": (1e-2, 3e-2, 3e-3, 1e-1),
    "ia3": (1e-2, 3e-2, 3e-3, 1e-1),
    "bitfit": (3e-3, 1e-2, 1e-3),
    "dora": (1e-3, 2e-3, 5e-4, 4e-3),
}
TIMES = (1, 2, 0.5)  # of any other experiment's own rate
METHODS = {"article": ("full", "lora", "qlora", "adapter", "prefix"), "all": tuple(RATES)}


def get_config(arg: str = ""):
    args = parse.typed_args(arg, model="smollm2-135m", task="movie_rating", budget="short", methods="article")
    config = base.get_config(model=args["model"], task=args["task"])
    config.method = type(config)({"name": "each experiment's own"})
    config.eval.update(part="validation", probe="")
    return sweeps.sweep(config, args["budget"], methods=_methods(args["methods"]))


def _methods(named: str) -> tuple[str, ...]:
    """Those of a name of ``METHODS``, or experiments named one by one, with a plus between them."""
    methods = METHODS[named] if named in METHODS else tuple(named.split("+"))
    known = {file.stem for file in Path(__file__).parent.glob("*.py")} - {"compare"}
    if unknown := [name for name in methods if name not in known]:
        raise PeftJaxError(f"methods={unknown[0]}: all, article, or experiments with a plus between them; "
                           f"{nearest(unknown[0], known)}")
    return methods


def get_cells(config):
    return sweeps.best_of(config, {name: _rates(name) for name in config.sweep.methods})


def _rates(name: str) -> tuple[float, ...]:
    own = sweeps.experiment_config(name).optim.learning_rate
    return RATES[name] if name in RATES else tuple(factor * own for factor in TIMES)
