"""Greedy decoding: tokens per second of the base, LoRA and QLoRA, beside transformers' base, in turn.

    python benchmarks/decoding.py                     # a random Llama of 1 B, batch 1 and 32, 64 new tokens, bfloat16
    python benchmarks/decoding.py --size=135m --dtype=float32 --batches=1         # a CPU
    python benchmarks/decoding.py --size=tiny --new=4 --rounds=1      # only that this script runs, on any machine

Prompts of 16 tokens; no text ends before ``--new`` tokens. Medians of ``--rounds`` calls; the first two calls of each,
which compile and warm up, are not counted. Ratios are of seconds, ours to transformers'. "QLoRA" decodes packed weights
for every token; "QLoRA, unpacked" once a call, which is part of its time (``generate(dequantize="always")``).
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.throughput import LORA, SIZES, in_turn, peft_is_here
from peft_jax import bind, chain, generate, lora, quantize, save_pretrained
from peft_jax.method import BASE
from peft_jax.models.llama import CausalLM, LlamaConfig

ALL_SIZES = {**SIZES, "135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e4, 2048, True)}  # as SmolLM2's
QLORA = chain(quantize("nf4", double_quant=True), lora(**LORA))
CASES = {"base": (BASE, "never"), "LoRA": (lora(**LORA), "never"), "QLoRA": (QLORA, "never"),
         "QLoRA, unpacked": (QLORA, "always")}  # (method, dequantize)


def ours(name: str, model, base, ids, new: int):
    method, dequantize = CASES[name]
    params = base if name == "base" else method.init(jax.random.key(1), base)
    apply = bind(method, model)
    nothing = (model.config.vocab_size,)  # a token that no text holds
    return lambda: np.asarray(generate(apply, model, params, ids, np.ones_like(ids), max_new_tokens=new,
                                       stop_ids=nothing, dequantize=dequantize))


def theirs(folder: str, ids, new: int, dtype: str):
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
    tokens = torch.tensor(ids, dtype=torch.long, device=device)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run():
        with torch.no_grad():
            return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options).cpu()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1b", choices=ALL_SIZES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    args = parser.parse_args()
    sizes, dtype = ALL_SIZES[args.size], jnp.dtype(args.dtype)
    model = CausalLM(sizes, dtype, dtype)
    base = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    beside = not args.alone and peft_is_here()
    print(f"{args.size}, {args.dtype}, {args.new} new tokens, {jax.devices()[0].device_kind}, jax {jax.__version__}"
          + ("" if beside else "; without transformers"))
    print("\n| rows | " + " | ".join([*(f"{name}, tokens/s" for name in CASES), "transformers, tokens/s",
                                      *(f"{name} / transformers" for name in CASES)]) + " |")
    print("|---" * (2 + 2 * len(CASES)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        if beside:
            save_pretrained(folder, model, base)
        for rows in map(int, args.batches.split(",")):
            ids = np.random.default_rng(0).integers(0, sizes.vocab_size, (rows, 16)).astype(np.int32)
            runs = {name: ours(name, model, base, ids, args.new) for name in CASES}
            runs |= {"theirs": theirs(folder, ids, args.new, args.dtype)} if beside else {}
            medians = in_turn(runs, args.rounds)
            there = medians.pop("theirs", None)
            cells = [str(rows), *(f"{rows * args.new / one:,.1f}" for one in medians.values()),
                     f"{rows * args.new / there:,.1f}" if there else "",
                     *(f"{one / there:.2f}" if there else "" for one in medians.values())]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
