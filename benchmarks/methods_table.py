"""The README's table of methods, from the methods themselves, on SmolLM2-135M.

    python benchmarks/methods_table.py

Trainable parameters are counted from the arrays of ``init`` with each method's defaults (or what is said in brackets);
the adapter's bytes are those of the files that ``save_adapter`` writes; whether it merges and has a place in peft's
file format is asked of the method and of peft, whether it trains on a quantised base is found by tracing its gradient
there. What a method is checked against is done in its tests; that
and its arguments are said in its file (``SHOWN``).
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lora_step import SOURCE

PEFT = "peft, both ways"


def shown(name: str) -> dict[str, Any] | None:
    """What the method's file says in ``SHOWN``, the rest filled in; ``None`` for a method that no table has."""
    from peft_jax.methods import METHODS

    own = getattr(METHODS.module(name), "SHOWN", {})
    return None if own is None else {"arguments": {}, "step": {}, "checked": PEFT, **own}


def note(config: Mapping[str, Any]) -> str:
    """What a reader must know of a method's arguments: its size, and the modules that it changes."""
    words = [f"r {config['r']}"] if config.get("r") else []
    for name, kind in (("num_virtual_tokens", int), ("token_indices", len)):
        words += [f"{kind(config[name])} tokens"] if name in config else []
    targets = [name.removesuffix("_proj") for name in config.get("target_modules") or () if name.endswith("_proj")]
    return ", ".join([*words, *([" ".join(targets)] if targets else [])])


def facts(method: Any, model: Any, base: Any, counts: Any) -> tuple[int, int, str, str, str]:
    """(trainable, all, bytes of the files, merges?, peft's format?) of a method on the real model."""
    import jax
    from peft import PeftType

    import peft_jax

    params = method.init(jax.random.key(0), base)
    trainable, everything = counts(method, base, params)
    merges = "yes" if method.mergeable else "no"
    if method.stored is None:
        return trainable, everything, "whole model", merges, "no"
    with tempfile.TemporaryDirectory() as folder:
        peft_jax.save_adapter(folder, method, model, params)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    theirs = "yes" if method.stored.kind in PeftType.__members__ else "own"
    return trainable, everything, f"{size:,}", merges, theirs


def on_quantised(method: Any, model: Any, base: Any) -> str:
    """Whether the method has a gradient on the shapes of a quantised base: "yes" or "no"."""
    import jax
    import jax.numpy as jnp

    import peft_jax

    try:
        params = jax.eval_shape(method.init, jax.random.key(0), base)
    except peft_jax.PeftJaxError:
        return "no"
    trainable, frozen = peft_jax.partition(params, method.labels(params))

    def loss(leaves, frozen):
        return peft_jax.bind(method, model)({"params": peft_jax.combine(frozen, leaves)}, jnp.ones((1, 8), int)).sum()

    jax.eval_shape(jax.grad(loss), trainable, frozen)
    return "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="", help="comma-separated; all of them where empty")
    args = parser.parse_args()

    import jax

    import peft_jax
    from peft_jax.cli.console import parameter_counts
    from peft_jax.methods import METHODS

    model, base = peft_jax.load_pretrained(SOURCE)
    quantised = jax.eval_shape(peft_jax.quantize(double_quant=True).init, jax.random.key(0), base)
    head = ("method", "trainable", "%", "adapter, bytes", "merges", "quantised base", "peft's file format",
            "checked against")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in args.methods.split(",") if args.methods else METHODS:
        if (row := shown(name)) is None:
            continue
        method = METHODS[name](**row["arguments"])
        trainable, everything, size, merges, theirs = facts(method, model, base, parameter_counts)
        said = row.get("note", note(method.config))
        cells = (f"{name} ({said})" if said else name, f"{trainable:,}", f"{100 * trainable / everything:.4f}", size,
                 merges, on_quantised(method, model, quantised), theirs, row["checked"])
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
