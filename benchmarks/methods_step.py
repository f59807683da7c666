"""One training step of each method here and in Hugging Face peft: same weights, batch and dtype (float32), in turn.

    python benchmarks/methods_step.py                          # all methods
    python benchmarks/methods_step.py --methods=lora,ia3 --steps=8

Prints a table: median step in seconds on each side, the ratio ours / peft's of medians of interleaved steps, and the
peak resident memory of each library run alone. Clipping and AdamW are inside the clock, compiling and data outside it.
Where peft has no such method its columns are empty; "full" is compared with plain torch, lorafa with peft's LoRA.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lora_step import SOURCE, batch_of, command_line, jax_step, peak_alone, peak_of, torch_step
from benchmarks.methods_table import shown


def ours(name: str) -> Any:
    """The method, with the arguments that its file shows it with."""
    from peft_jax.methods import METHODS

    return METHODS[name](**(row := shown(name))["arguments"] | row["step"])


def theirs(name: str) -> Any:
    """peft's config with the same words, ``None`` where it has no such method; () for plain torch, as of "full"."""
    import peft

    method = ours(name)
    if method.stored is None:
        return ()
    kind = getattr(peft.PeftType, method.stored.kind, None)
    if kind is None:
        return None
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(config)} - {"peft_type"}
    words = {name: list(value) if isinstance(value, tuple) else value for name, value in method.config.items()
             if name in known and value is not None}
    return config(task_type="CAUSAL_LM", **words)


def seconds(name: str, folder: str, args) -> list[float]:
    """Median step here and, where there is one, there."""
    batch = batch_of(args)
    steps = [jax_step(ours(name), batch)[0]]
    if (config := theirs(name)) is not None:
        steps.append(torch_step(config or None, folder))
    taken: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step(batch)
    for _ in range(args.steps):
        for times, step in zip(taken, steps, strict=True):
            begin = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - begin)
    return [float(np.median(times)) for times in taken]


def alone(case: str, args):
    """The step that ``--alone=side:method:folder`` names."""
    side, name, folder = case.split(":", 2)
    return jax_step(ours(name), batch_of(args))[0] if side == "peft_jax" else torch_step(theirs(name) or None, folder)


def row(name: str, folder: str, args) -> str:
    sides = ("peft_jax", "peft") if theirs(name) is not None else ("peft_jax",)
    took = seconds(name, folder, args)
    peaks = [peak_alone(__file__, f"{side}:{name}:{folder}", args) for side in sides]
    if len(sides) == 1:
        return f"| {name} | {took[0]:.2f} | | | {peaks[0]:.0f} | | |"
    return (f"| {name} | {took[0]:.2f} | {took[1]:.2f} | {took[0] / took[1]:.2f} | {peaks[0]:.0f} | {peaks[1]:.0f} | "
            f"{peaks[0] / peaks[1]:.2f} |")


def main() -> None:
    parser = command_line(__doc__, steps=5)
    parser.add_argument("--methods", default="", help="comma-separated; all of them where empty")
    args = parser.parse_args()
    if args.alone:
        return print(peak_of(alone(args.alone, args), batch_of(args)))

    import peft_jax
    from peft_jax.methods import METHODS

    head = "| method | step here, s | in peft, s | ratio | peak here, MiB | in peft, MiB | ratio |"
    print(head + "\n|" + "---|" * 7, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peft_jax.save_pretrained(folder, *peft_jax.load_pretrained(SOURCE))
        for name in args.methods.split(",") if args.methods else filter(shown, METHODS):
            print(row(name, folder, args), flush=True)


if __name__ == "__main__":
    main()
