"""Products with a quantised kernel against the plain one: forward alone, and forward with the gradient in x.

    python benchmarks/quant_dot.py                      # a few shapes of SmolLM2-135M and Llama 3 8B
    python benchmarks/quant_dot.py --shape=16x4096x4096 --quant_types=nf4,int8 --dtype=bfloat16

A shape is tokens x inputs x outputs. The kinds take turns within one run; printed is each kind's median over the plain
product's, beside the plain one in milliseconds, and the leaf's bits per parameter.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a clone that is not installed

import jax
import jax.numpy as jnp

from peft_jax import quantize_array
from peft_jax.quant import dot

SHAPES = ("512x576x576", "512x576x1536", "1x4096x4096", "512x4096x4096")


def make_kernels(inputs: int, outputs: int, dtype, quant_types: list[str], double_quant: bool) -> dict:
    """{name: kernel}, the plain one first."""
    kernel = jax.random.normal(jax.random.key(0), (inputs, outputs), dtype) / inputs**0.5
    return {"plain": kernel} | {t: quantize_array(kernel, t, double_quant=double_quant) for t in quant_types}


def forward(x, kernel):
    return dot(x, kernel)


def with_gradient(x, kernel):
    return jax.grad(lambda x: jnp.square(dot(x, kernel).astype(jnp.float32)).sum())(x)


def medians(function, x, kernels: dict, repeats: int) -> dict[str, float]:
    """{name: median seconds}, the kernels in turn, each compiled and run once before."""
    run = jax.jit(function)
    for kernel in kernels.values():
        jax.block_until_ready(run(x, kernel))
    seconds = {name: [] for name in kernels}
    for _ in range(repeats):
        for name, kernel in kernels.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(x, kernel))
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(shape: str, args) -> None:
    tokens, inputs, outputs = map(int, shape.split("x"))
    dtype = jnp.dtype(args.dtype)
    kernels = make_kernels(inputs, outputs, dtype, args.quant_types.split(","), args.double_quant)
    x = jax.random.normal(jax.random.key(1), (tokens, inputs), dtype)
    for function in (forward, with_gradient):
        found = medians(function, x, kernels, args.repeats)
        for name, kernel in kernels.items():
            bits = 8 * kernel.nbytes / kernel.size
            print(f"{shape:>16} {function.__name__:>14} {name:>12} {bits:8.3f} {1e3 * found[name]:10.3f} "
                  f"{found[name] / found['plain']:8.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default=",".join(SHAPES))
    parser.add_argument("--quant_types", default="nf4,int4,int4_affine,int8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--double_quant", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(f"{'shape':>16} {'pass':>14} {'kernel':>12} {'bits':>8} {'ms':>10} {'ratio':>8}")
    for shape in args.shape.split(","):
        show(shape, args)


if __name__ == "__main__":
    main()
