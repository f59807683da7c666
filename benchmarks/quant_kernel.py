"""Products with a quantised weight on a GPU: the fused kernel, the plain product, bfloat16, and bitsandbytes, in turn.

    python benchmarks/quant_kernel.py                                   # NF4, (1, 16, 512, 4096) tokens, two shapes
    python benchmarks/quant_kernel.py --quant_type=int4 --block_size=32 --rounds=20
    python benchmarks/quant_kernel.py --interpret --small               # only that this script runs, on any machine

Prints a table: median microseconds of a product in bfloat16, forward ("y") and of the gradient of its input ("dx"), and
ratios of medians. A call is one program of ``--copies`` products with as many weights and inputs, so that no weight
stays in a cache and starting a program counts little; bitsandbytes is called that often by torch, "y" alone, and has a
column where its CUDA library is there (nf4 and fp4). A fused product is timed only where it agrees with the plain one
before; where it does not, or ends in an error, its cell says so, and so does the exit code.
"""

import argparse
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_jax import quant
from peft_jax.quant import pallas

TOKENS, SHAPES = (1, 16, 512, 4096), ((4096, 4096), (4096, 14336))
SMALL_TOKENS, SMALL_SHAPES = (1,), ((128, 64),)


def forward(x, weight):
    return quant.dot(x, weight, x.dtype) if quant.is_leaf(weight) else x @ weight


def gradient(g, weight):
    """Of the input; the forward product that it is asked of is no part of the program."""
    x = jnp.zeros((len(g), weight.shape[0]), g.dtype)
    return jax.vjp(lambda x: forward(x, weight), x)[1](g)[0]


def weights(shape, args) -> dict[str, list]:
    """Lists of copies: bfloat16, and leaves that are read by the plain and by the fused product."""
    keys = jax.random.split(jax.random.key(0), args.copies)
    plain = [(jax.random.normal(key, shape) / shape[0]**0.5).astype(jnp.bfloat16) for key in keys]
    leaves = [quant.quantize_array(one, args.quant_type, block_size=args.block_size, double_quant=args.double_quant)
              for one in plain]
    fused = "interpreted" if args.interpret else "fused"
    return {"bf16": plain, "plain": leaves, "fused": [dataclasses.replace(leaf, product=fused) for leaf in leaves]}


def programs(product, held, inputs) -> dict:
    """{name: a function that runs all copies and waits}."""
    product = jax.jit(product)  # so that the copies are one function, and a kernel is compiled once
    run = jax.jit(lambda inputs, held: [product(x, one) for x, one in zip(inputs, held)])
    return {name: lambda ones=ones: jax.block_until_ready(run(inputs, ones)) for name, ones in held.items()}


def bitsandbytes_program(held, inputs, args):
    """The same forward products by bitsandbytes, or ``None`` where it has no CUDA library or no such type."""
    if args.interpret or args.quant_type not in ("nf4", "fp4"):
        return None
    try:
        import bitsandbytes as bnb
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None

    def there(array):
        return torch.tensor(np.asarray(array, np.float32), dtype=torch.bfloat16, device="cuda")

    coded = [bnb.functional.quantize_4bit(there(one.T).contiguous(), blocksize=args.block_size,
                                          quant_type=args.quant_type, compress_statistics=args.double_quant)
             for one in held["bf16"]]
    inputs = [there(x) for x in inputs]

    def run():
        found = [bnb.matmul_4bit(x, code.t(), quant_state=state) for x, (code, state) in zip(inputs, coded)]
        torch.cuda.synchronize()
        return found

    return run


def wrong(runs) -> str:
    """What is wrong with the fused product, in words; "" if both quantised ones agree up to bfloat16's rounding."""
    expected = runs["plain"]()
    try:
        found = runs["fused"]()
    except Exception as error:  # whatever a compiler or a device says
        return f"FAILED: {(str(error).strip() or type(error).__name__).splitlines()[0][:200].replace('|', '/')}"
    for plain, fused in zip(expected, found, strict=True):
        plain, fused = np.asarray(plain, np.float32), np.asarray(fused, np.float32)
        if not np.abs(plain - fused).max() <= 2**-6 * np.abs(plain).max():
            return f"WRONG: off by {np.abs(plain - fused).max():.2g} of {np.abs(plain).max():.2g}"
    return ""


def medians(runs, args) -> dict[str, float]:
    """Microseconds of one product, the contestants in turn."""
    taken = {name: [] for name in runs}
    for name in runs:
        runs[name]()
    for _ in range(args.rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - begin) / args.copies * 1e6)
    return {name: float(np.median(times)) for name, times in taken.items()}


def row(tokens, shape, way, held, args) -> tuple[bool, str]:
    """(whether the fused product is right, a row of the table)."""
    product, width = (forward, shape[0]) if way == "y" else (gradient, shape[1])
    keys = jax.random.split(jax.random.key(1), args.copies)
    inputs = [jax.random.normal(key, (tokens, width)).astype(jnp.bfloat16) for key in keys]
    runs = programs(product, held, inputs)
    if why := wrong(runs):
        del runs["fused"]
    if way == "y" and (theirs := bitsandbytes_program(held, inputs, args)):
        runs["bnb"] = theirs
    took = medians(runs, args)
    cells = [str(tokens), f"{shape[0]}x{shape[1]}", way, *(f"{took[name]:.1f}" for name in ("bf16", "plain"))]
    cells += [why or f"{took['fused']:.1f}", *(ratio(took, name) for name in ("bf16", "plain"))]
    cells += [f"{took['bnb']:.1f}" if "bnb" in took else "", ratio(took, "bnb")]
    return not why, "| " + " | ".join(cells) + " |"


def ratio(took, name) -> str:
    """Of the fused product's time to another's, "" where one is not there."""
    return f"{took['fused'] / took[name]:.2f}" if "fused" in took and name in took else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quant_type", default="nf4", choices=quant.QUANT_TYPES)
    parser.add_argument("--block_size", type=int, default=64, choices=pallas.BLOCKS)
    parser.add_argument("--double_quant", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--interpret", action="store_true", help="Pallas' interpreter: its times mean nothing")
    parser.add_argument("--small", action="store_true", help="a tiny case")
    args = parser.parse_args()
    if not args.interpret and jax.default_backend() != "gpu":
        raise SystemExit(f"There is no GPU here (jax runs on {jax.default_backend()}), and nothing else is worth "
                         "timing: --interpret --small shows that this script runs.")
    if args.small:
        args.copies = 1
    shapes = SMALL_SHAPES if args.small else SHAPES
    leaf = jax.eval_shape(partial(quant.quantize_array, quant_type=args.quant_type, block_size=args.block_size),
                          jax.ShapeDtypeStruct(shapes[0], jnp.bfloat16))
    if not args.interpret and (why := pallas.why_plain(leaf, jnp.bfloat16)):
        raise SystemExit(f"The fused product is the plain one here: {why}.")
    print(f"{jax.devices()[0].device_kind}: {args.quant_type}, blocks of {args.block_size}, "
          f"{'double' if args.double_quant else 'single'} quantisation; bfloat16, microseconds"
          + (", INTERPRETED: the times mean nothing" if args.interpret else ""))
    print("| tokens | in x out | way | bf16 | plain | fused | fused / bf16 | fused / plain | bitsandbytes | fused / "
          "bitsandbytes |\n" + "|---" * 10 + "|", flush=True)
    right = True
    for shape in shapes:
        held = weights(shape, args)
        for tokens in SMALL_TOKENS if args.small else TOKENS:
            for way in ("y", "dx"):
                agrees, line = row(tokens, shape, way, held, args)
                right &= agrees
                print(line, flush=True)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
