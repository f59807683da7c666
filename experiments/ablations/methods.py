"""Which method learns most in one budget? Each with a small sweep of its learning rate.

    python experiments/ablations/methods.py --steps=30 --limit=100
    python experiments/ablations/methods.py --steps=30 --limit=100 --methods=others   # every other experiment, as it is

Question: on SmolLM2-135M and the default task, how do the methods compare when all see the same batches and each has
its own learning rate? (A shared rate makes IA3 and prefix tuning look bad.) Every run is ``run.py`` on the method's own
experiment with the budget, the rate and nothing else changed; a finished run is not run again, an interrupted one goes
on. The other experiments run once, at the rate that they state: not a comparison. Prints every run, and for each method
the best by accuracy among the five words. The rate is chosen on the sentences that are reported, for all methods alike:
compare within the table. Measured figures are in LOG.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.ablations import runs

RATES = {  # in the order in which they are tried
    "full": (5e-5, 2e-4, 2e-5),
    "lora": (1e-3, 2e-3, 5e-4),
    "dora": (1e-3, 2e-3, 5e-4),
    "adapter": (1e-3, 2e-3, 5e-4),
    "prefix": (3e-2, 1e-1, 1e-2),
    "prompt": (3e-2, 1e-1, 1e-2),
    "ia3": (1e-2, 3e-2, 3e-3),
    "bitfit": (3e-3, 1e-2, 1e-3),
}
OTHERS = {  # what they have to change for a short budget
    "rslora": (), "pissa": (), "olora": (), "eva": (), "lorafa": (), "loraplus": (),
    "adalora": ("--config.method.tinit=3", "--config.method.tfinal=5"), "vera": (), "loha": (), "lokr": (), "oft": (),
    "hra": (), "pfeiffer": (), "parallel_adapter": (), "compacter": (), "mam": (), "ptuning": (), "ln_tuning": (),
    "trainable_tokens": (),
}
# What some of the experiments set for themselves, made the same for all.
SAME = tuple(f"--config.{key}={value}" for key, value in {
    "model.dtype": "float32", "model.param_dtype": "float32", "model.remat": False, "data.batch_size": 16,
    "optim.accumulate_steps": 1, "optim.epochs": 0, "eval.every_epoch": False, "checkpoint.every_epoch": False,
    "checkpoint.every": 1000000, "log.tensorboard": False,
}.items())
COLUMNS = {"exact": "exact", "among_choices": "among five", "spearman": "Spearman", "probe_loss": "general loss"}


def run(method: str, rate: float | None, args) -> dict:
    """The results of one run; without a ``rate`` at the experiment's own."""
    own = OTHERS[method] if rate is None else (f"--config.optim.learning_rate={rate}",)
    return runs.run(method, method if rate is None else f"{method}-{rate:g}", [*SAME, *own], args)


def row(name: str, results: dict) -> str:
    found = [f"{results['before'][key]:.3f} → {results['after'][key]:.3f}" for key in COLUMNS]
    share = f"{100 * results['trainable'] / results['all']:.3f} %"
    return f"| {name} | {share} | {' | '.join(found)} | {results['seconds']:.0f} s |"


def main() -> None:
    parser = runs.command_line(__doc__, "runs/methods")
    parser.add_argument("--methods", default=",".join(RATES), help="names, or others")
    parser.add_argument("--rates", type=int, default=3, help="how many of each method's rates")
    args = parser.parse_args()
    head = f"| method, rate | trainable | {' | '.join(COLUMNS.values())} | training |"
    print(head + "\n|" + "---|" * (head.count("|") - 1), flush=True)
    best = {}
    if args.methods == "others":
        for method in OTHERS:
            if results := run(method, None, args):
                print(row(method, results), flush=True)
        return
    for trial in range(args.rates):  # all methods at their first rate, then at the second: a part is balanced too
        for method in args.methods.split(","):
            if results := run(method, RATES[method][trial], args):
                line = row(f"{method} {RATES[method][trial]:g}", results)
                print(line, flush=True)
                best[method] = max(best.get(method, (-1, "")), (results["after"]["among_choices"], line))
    print("\nBest of each:\n" + "\n".join(line for _, line in best.values()))


if __name__ == "__main__":
    main()
