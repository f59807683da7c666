"""The README's table of methods, from the methods themselves, on SmolLM2-135M.

    python benchmarks/methods_table.py

Trainable parameters are counted from the arrays of ``init`` with each method's defaults (or what is said in brackets);
the adapter's bytes are those of the files that ``save_adapter`` writes; whether it merges and has a place in peft's
file format is asked of the method and of peft, whether it trains on a quantised base is found by tracing its gradient
there. What a method is checked against is done in its tests, and said here.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lora_step import SOURCE

QV = ("q_proj", "v_proj")
PEFT = "peft, both ways"
# name: (arguments, what they are, what it is checked against)
ROWS = {
    "full": ({}, "", "transformers"),
    "lora": ({"r": 16, "lora_alpha": 32}, "r 16, q v", PEFT),
    "dora": ({"r": 16, "lora_alpha": 32}, "r 16, q v", PEFT),
    "lorafa": ({"r": 16, "lora_alpha": 32}, "r 16, q v", PEFT),
    "loraplus": ({"r": 16, "lora_alpha": 32}, "r 16, q v", PEFT),
    "adalora": ({"total_step": 1000, "target_modules": QV}, "12 → 8, q v", PEFT),
    "vera": ({"target_modules": QV}, "r 256, q v", PEFT),
    "loha": ({"target_modules": QV}, "r 8, q v", PEFT),
    "lokr": ({"target_modules": QV}, "r 8, q v", PEFT),
    "oft": ({"target_modules": QV}, "q v", PEFT),
    "hra": ({"target_modules": QV}, "r 8, q v", PEFT),
    "ia3": ({}, "k v down", PEFT),
    "ln_tuning": ({}, "", PEFT),
    "bitfit": ({"add_missing": True}, "added biases", "equation"),
    "trainable_tokens": ({"token_indices": (0, 1, 2, 3)}, "4 tokens", PEFT),
    "prefix": ({"num_virtual_tokens": 20}, "20 tokens", PEFT),
    "prompt": ({"num_virtual_tokens": 20}, "20 tokens", PEFT),
    "ptuning": ({"num_virtual_tokens": 20}, "20 tokens", PEFT),
    "houlsby": ({}, "", "`adapters` 1.3, golden values"),
    "pfeiffer": ({}, "", "`adapters` 1.3, golden values"),
    "parallel_adapter": ({}, "", "`adapters` 1.3, golden values"),
    "compacter": ({"reduction_factor": 16}, "reduction 16", "`adapters` 1.3, golden values"),
}


def facts(name: str, model, base, counts) -> tuple[int, int, str, str, str]:
    """(trainable, all, bytes of the files, merges?, peft's format?) of a method on the real model."""
    import jax
    from peft import PeftType

    import peft_jax
    from peft_jax.methods import METHODS

    method = METHODS[name](**ROWS[name][0])
    params = method.init(jax.random.key(0), base)
    trainable, everything = counts(method, base, params)
    merges = "yes" if method.merge else "no"
    if method.stored is None:
        return trainable, everything, "whole model", merges, "no"
    with tempfile.TemporaryDirectory() as folder:
        peft_jax.save_adapter(folder, method, model, params)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    theirs = "yes" if method.stored.kind in PeftType.__members__ else "own"
    return trainable, everything, f"{size:,}", merges, theirs


def on_quantised(name: str, model, held) -> str:
    """Whether the method has a gradient on the shapes of a quantised base: "yes" or "no"."""
    import jax
    import jax.numpy as jnp

    import peft_jax
    from peft_jax.methods import METHODS

    method = METHODS[name](**ROWS[name][0])
    try:
        params = jax.eval_shape(method.init, jax.random.key(0), held)
    except peft_jax.PeftJaxError:
        return "no"
    trainable, frozen = peft_jax.partition(params, method.labels(params))

    def loss(leaves, frozen):
        return peft_jax.bind(method, model)({"params": peft_jax.combine(frozen, leaves)}, jnp.ones((1, 8), int)).sum()

    jax.eval_shape(jax.grad(loss), trainable, frozen)
    return "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(ROWS))
    args = parser.parse_args()

    import jax

    import peft_jax
    from peft_jax.cli.console import parameter_counts

    model, base = peft_jax.load_pretrained(SOURCE)
    held = jax.eval_shape(peft_jax.quantize(double_quant=True).init, jax.random.key(0), base)
    head = ("method", "trainable", "%", "adapter, bytes", "merges", "quantised base", "peft's file format",
            "checked against")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in args.methods.split(","):
        trainable, everything, size, merges, theirs = facts(name, model, base, parameter_counts)
        label = f"{name} ({ROWS[name][1]})" if ROWS[name][1] else name
        share = f"{100 * trainable / everything:.4f}"
        found = (f"{trainable:,}", share, size, merges, on_quantised(name, model, held), theirs, ROWS[name][2])
        print(f"| {label} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
