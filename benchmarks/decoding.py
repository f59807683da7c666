"""Greedy decoding: tokens per second of the base, LoRA and QLoRA, beside transformers' base, in turn.

    python benchmarks/decoding.py                     # a random Llama of 1 B, batch 1 and 32, 64 new tokens, bfloat16
    python benchmarks/decoding.py --size=tiny --new=4 --rounds=1      # only that this script runs, on any machine

Prompts of 16 tokens; no text ends before ``--new`` tokens. Medians of ``--rounds`` calls; the first call of each, which
compiles, is not counted. Ratios are of seconds, ours to transformers'.
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
from peft_jax.models.llama import CausalLM

METHODS = {"base": BASE, "LoRA": lora(**LORA), "QLoRA": chain(quantize("nf4", double_quant=True), lora(**LORA))}


def ours(name: str, model, base, ids, new: int):
    method = METHODS[name]
    params = base if name == "base" else method.init(jax.random.key(1), base)
    apply = bind(method, model)
    nothing = (model.config.vocab_size,)  # a token that no text holds
    return lambda: np.asarray(generate(apply, model, params, ids, np.ones_like(ids), max_new_tokens=new,
                                       stop_ids=nothing))


def theirs(folder: str, ids, new: int):
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
    tokens = torch.tensor(ids, dtype=torch.long, device=device)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run():
        with torch.no_grad():
            return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options).cpu()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1b", choices=SIZES)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    args = parser.parse_args()
    sizes = SIZES[args.size]
    model = CausalLM(sizes, jnp.bfloat16, jnp.bfloat16)
    base = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    beside = not args.alone and peft_is_here()
    print(f"{args.size}, {args.new} new tokens, {jax.devices()[0].device_kind}, jax {jax.__version__}"
          + ("" if beside else "; without transformers"))
    print("\n| rows | " + " | ".join([*(f"{name}, tokens/s" for name in METHODS), "transformers, tokens/s",
                                      *(f"{name} / transformers" for name in METHODS)]) + " |")
    print("|---" * (2 + 2 * len(METHODS)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        if beside:
            save_pretrained(folder, model, base)
        for rows in map(int, args.batches.split(",")):
            ids = np.random.default_rng(0).integers(0, sizes.vocab_size, (rows, 16)).astype(np.int32)
            runs = {name: ours(name, model, base, ids, args.new) for name in METHODS}
            runs |= {"theirs": theirs(folder, ids, args.new)} if beside else {}
            medians = in_turn(runs, args.rounds)
            there = medians.pop("theirs", None)
            cells = [str(rows), *(f"{rows * args.new / one:,.0f}" for one in medians.values()),
                     f"{rows * args.new / there:,.0f}" if there else "",
                     *(f"{one / there:.2f}" if there else "" for one in medians.values())]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
