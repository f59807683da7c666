"""Made-up records: no number here was measured."""

import math
import random

METHODS = {  # label: trainable parameters, test accuracy, observed bytes, forgetting, merged latency or None
    "full": (134_515_008, 0.61, 2.9e9, 0.42, 1.0), "lora": (921_600, 0.58, 1.31e9, 0.08, 1.0),
    "qlora": (921_600, 0.57, 0.72e9, 0.09, 1.0), "dora": (1_013_760, 0.585, 1.42e9, 0.07, 1.0),
    "adapter": (1_900_000, 0.575, 1.30e9, 0.11, None), "prefix": (368_640, 0.47, 0.98e9, 0.02, None),
    "prompt": (11_520, 0.41, 1.02e9, -0.01, None), "ia3": (57_600, 0.50, 1.10e9, 0.01, 1.0),
    "bitfit": (40_320, 0.49, 1.05e9, 0.015, 1.0),
}  # fmt: skip


def record(label="lora", seed=0, rate=1e-3, chosen=True, axes=("optim.learning_rate",), settings=None, **changed):
    """Of one of METHODS; ``changed`` replaces keys of the part ``peft_jax``."""
    trainable, accuracy, memory, forgotten, merged = METHODS[label]
    rng = random.Random(f"{label}{seed}{rate}{settings}")
    test = accuracy + rng.gauss(0, 0.008)
    settings = {"optim.learning_rate": rate, "seed": seed} if settings is None else settings
    told = "-".join(f"{key.split('.')[-1]}{value}" for key, value in settings.items())
    ours = {
        "cell": {"sweep": "compare", "name": f"{label}-{told}", "label": label, "settings": settings,
                 "axes": list(axes), "chosen": chosen},
        "metric": "among_choices", "validation": {"among_choices": test - 0.01, "loss": 1.2},
        "base_test": {"among_choices": 0.31, "loss": 2.9},
        "general": {"newspaper": {"before": 4.65, "after": 4.65 + forgotten + rng.gauss(0, 0.01)},
                    "amazon": {"before": 4.1, "after": 4.1 + forgotten / 2 + rng.gauss(0, 0.01)}},
        "neighbours": {"tweets": {"before": 0.40, "after": 0.40 + rng.gauss(0.03, 0.02)}},
        "latency": {"base": {"prefill": 0.050, "token": 0.012},
                    "unmerged": {"prefill": 0.054 + rng.random() / 200, "token": 0.0131 + rng.random() / 500},
                    "merged": merged and {"prefill": 0.0502, "token": 0.01203}},
        "memory": {"observed": memory, "compiled": memory * 0.93}, "tokens_per_second": 900 + rng.random() * 100,
        "adapter_bytes": trainable * 4,
        "loss": [[step, 1.0 + 2.2 * math.exp(-step / (20 + 300 * (1 - accuracy) ** 2)) + rng.gauss(0, 0.05)]
                 for step in range(1, 101)],
    }  # fmt: skip
    if chosen is not False:
        ours["test"] = {"exact": test - 0.02, "among_choices": test, "spearman": 0.6, "loss": 1.1}
    return {"run_info": run_info(f"{label}/smollm2-135m-{told}", rate, seed),
            "train_info": train_info(trainable, 134_515_008 + (label != "full") * trainable, memory),
            "meta_info": meta_info(), "peft_jax": ours | changed}  # fmt: skip


def run_info(name, rate=1e-4, seed=0, error="", model="HuggingFaceTB/SmolLM2-135M-Instruct", steps=100):
    return {"created_at": "2026-11-25T21:36:42+00:00", "total_time": 125.2, "experiment_name": name,
            "peft_branch": "main", "peft_config": {"peft_type": "LORA", "r": 8}, "error_msg": error,
            "train_config": {"model_id": model, "dtype": "float32", "max_steps": steps, "batch_size": 16, "seed": seed,
                             "optimizer_kwargs": {"lr": rate, "weight_decay": 0.0}}}  # fmt: skip


def train_info(trainable, total, memory, status="success"):
    rows = [{"step": step, "valid accuracy": 0.3 + step / 1000, "train loss": 2.0 - step / 100,
             "tokens / sec": 950.0} for step in (25, 50, 75, 100)]  # fmt: skip
    return {"accelerator_memory_max": memory, "train_time": 100.0, "file_size": 4 * trainable, "status": status,
            "num_trainable_params": trainable, "num_total_params": total, "metrics": rows}  # fmt: skip


def meta_info():
    return {"model_info": {"sha": "12fd25f", "created_at": "2024-10-31T00:00:00+00:00"},
            "dataset_info": {"reviews": {"sha": "aa4f34d"}}, "package_info": {"jax-version": "0.10.2"},
            "system_info": {"system": "Linux", "machine": "x86_64", "processor": "x86_64", "accelerator": "cpu"},
            "pytorch_info": ""}  # fmt: skip


def peft_record(name="lora/llama-3.2-3B-rank32", accuracy=0.48, forgetting=0.51, memory="accelerator_memory_max"):
    """As peft's own method_comparison writes them: no part of ours, a last row with the test accuracy."""
    train = train_info(9_175_040, 3_221_924_864, 22e9)
    train[memory] = train.pop("accelerator_memory_max")
    train["metrics"].append({"step": 5000, "test accuracy": accuracy, "train loss": 0.6, "train samples": 20000,
                             "train total tokens": 4198051, "forgetting": forgetting})  # fmt: skip
    return {"run_info": run_info(name, model="meta-llama/Llama-3.2-3B", steps=5000), "train_info": train,
            "meta_info": meta_info()}  # fmt: skip


def failed(name="lora/smollm2-135m-lr1", error="the loss is NaN at step 12", status="failed"):
    return {"run_info": run_info(name, 1.0, error=error), "meta_info": meta_info(),
            "train_info": train_info(921_600, 135_436_608, 1e9, status)}  # fmt: skip


def comparison(seeds=3):
    """Every method, at its chosen rate with several seeds, and at two rates that were not chosen; a failed run."""
    found = [record(label, seed) for label in METHODS for seed in range(seeds)]
    return [*found, *(record(label, rate=rate, chosen=False) for label in METHODS for rate in (3e-4, 3e-3)), failed()]


def hostile():
    """Text that would be a tag, an entity, a column, an escape sequence."""
    bad = record(settings={"method.note": "<script>alert(1)</script>|`x`", "seed": 0})
    bad["peft_jax"]["cell"]["label"] = "<script>alert(1)</script> & \"x\" | $\\frac{1}$ \x1b[31m"
    bad["run_info"]["experiment_name"] = "lora/<img src=x onerror=alert(1)>"
    bad["run_info"]["train_config"]["model_id"] = "<b>model</b> $x_1$"
    return [bad, failed("x/<script>", "</details><script>alert(2)</script>\nsecond line")]
