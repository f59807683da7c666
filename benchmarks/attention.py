"""Causal attention of one layer, forward and back, by each program that this device has, in turn.

    python benchmarks/attention.py                    # Llama 3.1 8B's heads, rows of 2048 and 4096 tokens, bfloat16
    python benchmarks/attention.py --small            # only that this script runs, on any machine

What a program is told: ``mask``, the boolean (B, 1, T, S) array that packed rows need; ``causal``, that no token sees a
later one, by which a kernel skips half of its blocks; ``lengths``, how long each row is, too, as in training on rows of
one text each (here an eighth of the second half of the rows is padding); ``segments``, which text of a packed row each
token is of. Prints median milliseconds and ratios to the first program. Nothing is timed before the programs agree.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_jax.models.attention import PROGRAMS, flash_lacks
from peft_jax.models.masks import RowMask, dense
from peft_jax.models.splash import device_lacks

HEADS, KEY_HEADS, SIZE = 32, 8, 128


def lengths_of(rows: int, length: int):
    """Real tokens of each row."""
    return jnp.where(jnp.arange(rows) < (rows + 1) // 2, length, length - length // 8)


def attend(how: str, implementation: str, query, key, value):
    rows, length = query.shape[:2]
    if how == "causal":
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=implementation)
    words = {"lengths": RowMask(length, True, lengths_of(rows, length)), "mask": RowMask(length, True),
             "segments": RowMask(length, True, segment_ids=jnp.ones((rows, length), jnp.int32))}[how]
    return PROGRAMS[implementation](query, key, value, dense(words, (rows, length)) if how == "mask" else words)


def program(how: str, implementation: str):
    """(query, key, value) -> the gradients of the sum of squares over real tokens."""
    def loss(*arrays):
        rows, length = arrays[0].shape[:2]
        real = (jnp.arange(length) < lengths_of(rows, length)[:, None])[..., None, None]
        return (jnp.where(real, attend(how, implementation, *arrays), 0).astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def arrays_of(rows: int, length: int, heads: tuple[int, int], size: int, dtype):
    shapes = [(rows, length, count, size) for count in (heads[0], heads[1], heads[1])]
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


def check(name: str, gradients, reference) -> None:
    for one, other in zip(gradients, reference):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        off = np.abs(one - other).max() / np.abs(other).max()
        if not off <= 0.05:
            raise SystemExit(f"{name} is wrong: off by {off:.2g} of the largest gradient")


def medians(runs: dict, rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in taken.items()}


def programs(query) -> list[str]:
    """Which there are here, the plain one first; what is lacking is printed."""
    found = ["xla mask", "xla causal"]
    for name, why, told in (("cudnn", flash_lacks(query), ("mask", "causal", "lengths")),
                            ("splash", device_lacks(query), ("lengths", "segments"))):
        found += [] if why else [f"{name} {how}" for how in told]
        if why:
            print(f"without {name}, which wants {why}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="a tiny case")
    args = parser.parse_args()
    heads, size = ((4, 2), 8) if args.small else ((HEADS, KEY_HEADS), SIZE)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {heads[0]} heads, {heads[1]} of keys, of {size}; "
          "bfloat16; forward and back, milliseconds")
    columns = programs(jax.ShapeDtypeStruct((1, 2, heads[0], size), jnp.bfloat16))
    print("\n| tokens | " + " | ".join([*columns, *(f"{name} / {columns[0]}" for name in columns[1:])]) + " |")
    print("|---" * 2 * len(columns) + "|")
    for length in (32,) if args.small else (2048, 4096):
        arrays = arrays_of(args.rows, length, heads, size, jnp.bfloat16)
        runs = {name: partial(program(*name.split()[::-1]), *arrays) for name in columns}
        reference = runs[columns[0]]()
        for name in columns:
            check(name, runs[name](), reference)
        took = medians(runs, args.rounds)
        cells = [f"{args.rows} x {length}", *(f"{took[name]:.2f}" for name in columns),
                 *(f"{took[name] / took[columns[0]]:.2f}" for name in columns[1:])]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
