"""How the cost of a LoRA step grows with length, rows, layers and rank, and whether compiling grows with depth.

    python benchmarks/growth.py                    # about ten minutes on 2 cores
    python benchmarks/growth.py --steps=3 --axes=layers

One axis is doubled from the middle model (8 layers, 512 wide, 4 rows of 256 tokens, r 16; float32, random weights),
the others stay. For each: seconds of a step (median), XLA's temporary memory, seconds of tracing and compiling; and the
exponent b of cost ~ size^b, fitted by least squares over the logarithms, so 1 is linear and 0 constant. Last, compiling
the same step again from the persistent cache (a fresh jit of it, ``jax_compilation_cache_dir``).
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_jax import bind, lora
from peft_jax.core import tree
from peft_jax.models.llama import CausalLM, LlamaConfig
from peft_jax.planner.compiled import memory_of
from peft_jax.planner.shapes import batch_shapes
from peft_jax.train.step import init_state, make_step

MIDDLE = {"length": 256, "rows": 4, "layers": 8, "rank": 16}
AXES = {"length": (64, 128, 256, 512, 1024), "rows": (1, 2, 4, 8), "layers": (2, 4, 8, 16), "rank": (4, 16, 64, 256)}


def ready(length: int, rows: int, layers: int, rank: int):
    """(jitted step, state, frozen, batch) of a random model."""
    sizes = LlamaConfig(8192, 512, 1376, layers, 8, 4, 64, 1e-5, 1e4, 2048, True)
    model, method = CausalLM(sizes), lora(r=rank, target_modules="all-linear")
    base = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = method.init(jax.random.key(1), base)
    trainable, frozen = tree.partition(params, method.labels(params))
    tx = optax.adamw(1e-4)
    batch = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), batch_shapes(rows, length, length - 1))
    batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), batch["positions"].shape)
    return make_step(bind(method, model), tx, 512), init_state(trainable, tx, jax.random.key(2)), frozen, batch


def measure(steps: int, **sizes: int) -> dict[str, float]:
    step, state, frozen, batch = ready(**sizes)
    began = time.perf_counter()
    compiled = step.lower(state, frozen, batch).compile()
    compiling = time.perf_counter() - began
    taken = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready(metrics)
        taken.append(time.perf_counter() - began)
    return {"step": statistics.median(taken[1:]), "memory": memory_of(compiled).temporaries, "compiling": compiling}


def exponent(sizes, costs) -> float:
    """The slope of log cost over log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def from_cache(folder: str) -> tuple[float, float]:
    """Seconds of tracing and compiling the middle step, at first and from the cache."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    found = []
    for _ in range(2):
        jax.clear_caches()
        step, *arguments = ready(**MIDDLE)
        began = time.perf_counter()
        step.lower(*arguments).compile()
        found.append(time.perf_counter() - began)
    return tuple(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--axes", default=",".join(AXES))
    args = parser.parse_args()
    print("| axis | size | step, s | temporaries, MiB | tracing and compiling, s |\n|---|---|---|---|---|")
    fits = []
    for axis in args.axes.split(","):
        found = [measure(args.steps, **{**MIDDLE, axis: size}) for size in AXES[axis]]
        for size, one in zip(AXES[axis], found, strict=True):
            print(f"| {axis} | {size} | {one['step']:.3f} | {one['memory'] / 2**20:.0f} | {one['compiling']:.1f} |",
                  flush=True)
        fits.append(f"| {axis} | " + " | ".join(f"{exponent(AXES[axis], [one[key] for one in found]):.2f}"
                                                for key in ("step", "memory", "compiling")) + " |")
    print("\n| exponent over | step | temporaries | tracing and compiling |\n|---|---|---|---|\n" + "\n".join(fits))
    with tempfile.TemporaryDirectory() as folder:
        first, again = from_cache(folder)
    print(f"\ntracing and compiling: {first:.1f} s at first, {again:.1f} s from the persistent cache")


if __name__ == "__main__":
    main()
