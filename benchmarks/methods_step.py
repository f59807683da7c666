"""One training step of each method here and in Hugging Face peft: same weights, batch and dtype (float32), in turn.

    python benchmarks/methods_step.py                          # all methods
    python benchmarks/methods_step.py --methods=lora,ia3 --steps=8

Prints a table: median step in seconds on each side, the ratio ours / peft's of medians of interleaved steps, and the
peak resident memory of each library run alone. Clipping and AdamW are inside the clock, compiling and data outside it.
Where peft has no such method its columns are empty; "full" is compared with plain torch.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lora_step import SOURCE, batch_of, command_line, jax_step, peak_alone, peak_of, torch_step

QV = ["q_proj", "v_proj"]
# name: (our arguments, peft's config class and its arguments; None: peft has no such method; () plain torch).
CASES = {
    "full": ({}, ()),
    "lora": ({"r": 16, "lora_alpha": 32, "target_modules": QV}, ("LoraConfig", {"r": 16, "lora_alpha": 32})),
    "dora": ({"r": 16, "lora_alpha": 32, "target_modules": QV},
             ("LoraConfig", {"r": 16, "lora_alpha": 32, "use_dora": True})),
    "adalora": ({"init_r": 16, "target_modules": QV, "total_step": 1000},
                ("AdaLoraConfig", {"init_r": 16, "total_step": 1000, "target_modules": QV})),
    "vera": ({"r": 64, "target_modules": QV}, ("VeraConfig", {"r": 64, "target_modules": QV})),
    "loha": ({"r": 8, "target_modules": QV}, ("LoHaConfig", {"r": 8, "target_modules": QV})),
    "lokr": ({"r": 8, "target_modules": QV}, ("LoKrConfig", {"r": 8, "target_modules": QV})),
    "oft": ({"target_modules": QV}, ("OFTConfig", {"target_modules": QV})),
    "hra": ({"r": 8, "target_modules": QV}, ("HRAConfig", {"r": 8, "target_modules": QV})),
    "ia3": ({}, ("IA3Config", {})),
    "ln_tuning": ({}, ("LNTuningConfig", {})),
    "prefix": ({"num_virtual_tokens": 20}, ("PrefixTuningConfig", {"num_virtual_tokens": 20})),
    "prompt": ({"num_virtual_tokens": 20}, ("PromptTuningConfig", {"num_virtual_tokens": 20})),
    "ptuning": ({"num_virtual_tokens": 20}, ("PromptEncoderConfig", {"num_virtual_tokens": 20})),
    "trainable_tokens": ({"token_indices": [1, 2, 3, 4]}, ("TrainableTokensConfig", {"token_indices": [1, 2, 3, 4]})),
    "houlsby": ({}, None),
    "bitfit": ({"add_missing": True}, None),
}


def ours(name: str):
    from peft_jax.methods import METHODS

    return METHODS[name](**CASES[name][0])


def theirs(name: str):
    import peft

    if not CASES[name][1]:
        return None
    kind, options = CASES[name][1]
    return getattr(peft, kind)(task_type="CAUSAL_LM", **options)


def seconds(name: str, folder: str, args) -> list[float]:
    """Median step here and, where there is one, there."""
    batch = batch_of(args)
    steps = [jax_step(ours(name), batch)[0]]
    if CASES[name][1] is not None:
        steps.append(torch_step(theirs(name), folder))
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
    return jax_step(ours(name), batch_of(args))[0] if side == "peft_jax" else torch_step(theirs(name), folder)


def row(name: str, folder: str, args) -> str:
    sides = ("peft_jax", "peft") if CASES[name][1] is not None else ("peft_jax",)
    took = seconds(name, folder, args)
    held = [peak_alone(__file__, f"{side}:{name}:{folder}", args) for side in sides]
    if len(sides) == 1:
        return f"| {name} | {took[0]:.2f} | | | {held[0]:.0f} | | |"
    return (f"| {name} | {took[0]:.2f} | {took[1]:.2f} | {took[0] / took[1]:.2f} | {held[0]:.0f} | {held[1]:.0f} | "
            f"{held[0] / held[1]:.2f} |")


def main() -> None:
    parser = command_line(__doc__, steps=5)
    parser.add_argument("--methods", default=",".join(CASES))
    args = parser.parse_args()
    if args.alone:
        return print(peak_of(alone(args.alone, args), batch_of(args)))

    import peft_jax

    head = "| method | step here, s | in peft, s | ratio | peak here, MiB | in peft, MiB | ratio |"
    print(head + "\n|" + "---|" * 7, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peft_jax.save_pretrained(folder, *peft_jax.load_pretrained(SOURCE))
        for name in args.methods.split(","):
            print(row(name, folder, args), flush=True)


if __name__ == "__main__":
    main()
