"""One QLoRA step beside a LoRA step here, and beside Hugging Face peft with bitsandbytes: same weights and batch.

    python benchmarks/qlora_step.py                      # all comparisons
    python benchmarks/qlora_step.py --cases=fp32 --steps=8

All linear layers, r 16, NF4 in blocks of 64, doubly quantised. ``fp32`` and ``bf16`` name the type of the computation
here; both sides run in turn in one process, a ratio is that of medians; compiling and data are outside the clock.
``compiled`` prints what XLA says each step of ours needs, with and without rematerialisation. ``peak`` is the most
memory that each side ever held, run alone. On a CPU torch computes bfloat16 many times slower than float32, so there
it computes in float32, whatever ours does.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lora_step import (
    SETTINGS,
    SOURCE,
    batch_of,
    command_line,
    jax_step,
    peak_alone,
    peak_of,
    their_lora,
    torch_step,
)

TARGETS = "all-linear"
SIDES = ("lora", "qlora", "peft+bnb")


def ours(name: str):
    import peft_jax

    lora = peft_jax.lora(target_modules=TARGETS, **SETTINGS)
    return peft_jax.chain(peft_jax.quantize(double_quant=True), lora) if name == "qlora" else lora


def theirs(folder: str):
    import torch
    import transformers

    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                               bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    return torch_step(their_lora(TARGETS), folder, quantization_config=settings, device_map="cpu")


def side(name: str, dtype: str, folder: str, batch: dict, remat: bool = False):
    if name == "peft+bnb":
        return theirs(folder), {}
    return jax_step(ours(name), batch, dtype=dtype, remat=remat)


def in_turn(dtype: str, folder: str, batch: dict, args) -> None:
    steps = {name: side(name, dtype, folder, batch)[0] for name in SIDES}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    losses = {name: step(batch) for name, step in steps.items()}
    for _ in range(args.steps):
        for name, step in steps.items():
            begin = time.perf_counter()
            step(batch)
            taken[name].append(time.perf_counter() - begin)
    medians = {name: float(np.median(times)) for name, times in taken.items()}
    for name, median in medians.items():
        print(f"  {name:<9} median step {median:6.3f} s, first loss {losses[name]:.4f}, "
              f"qlora / {name} {medians['qlora'] / median:.3f}", flush=True)


def compiled(folder: str, batch: dict) -> None:
    for remat in (False, True):
        found = {name: side(name, "float32", folder, batch, remat)[1] for name in ("lora", "qlora")}
        total = {name: facts["arguments MiB"] + facts["temporary MiB"] for name, facts in found.items()}
        for name, facts in found.items():
            print(f"  remat={remat!s:<5} {name:<6} arguments {facts['arguments MiB']:.0f} MiB, temporary "
                  f"{facts['temporary MiB']:.0f} MiB, together {total[name] / total['lora']:.2f} of lora's", flush=True)


def peaks(folder: str, args) -> None:
    for name in SIDES:
        print(f"  {name:<9} peak resident {peak_alone(__file__, f'{name}:{folder}', args):.0f} MiB", flush=True)


def main() -> None:
    parser = command_line(__doc__, steps=5)
    parser.add_argument("--cases", default="fp32,bf16,compiled,peak")
    args = parser.parse_args()
    batch = batch_of(args)
    if args.alone:
        name, folder = args.alone.split(":", 1)
        return print(peak_of(side(name, "float32", folder, batch)[0], batch))

    import peft_jax

    with tempfile.TemporaryDirectory() as folder:
        peft_jax.save_pretrained(folder, *peft_jax.load_pretrained(SOURCE))
        for case in args.cases.split(","):
            print(f"{case}: {args.rows} x {args.length} tokens", flush=True)
            if case in ("fp32", "bf16"):
                in_turn({"fp32": "float32", "bf16": "bfloat16"}[case], folder, batch, args)
            elif case == "compiled":
                compiled(folder, batch)
            else:
                peaks(folder, args)


if __name__ == "__main__":
    main()
