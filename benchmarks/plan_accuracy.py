"""How far a plan's sum of parts is from the compiled step's own analysis: methods, models, with and without remat.

    python benchmarks/plan_accuracy.py               # 36 steps compiled for the CPU, minutes; docs/plan.md's table
    python benchmarks/plan_accuracy.py --only=gpt2   # some of them, by words of their names
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python benchmarks/plan_accuracy.py --mesh   # 6 on 2 or 4 devices
    JAX_PLATFORMS=cpu python benchmarks/plan_accuracy.py --h100   # 11 steps compiled for an H100 that need not be there
    JAX_PLATFORMS=cpu python benchmarks/plan_accuracy.py --long   # parts of Llama 3.1 8B, 2k to 32k tokens, for an H100
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/plan_accuracy.py --long --tpu   # the same for a TPU v5p

Models of six layers in float32, 8 rows of 128 tokens, AdamW: nothing is allocated, as in any plan. With --h100, which
needs jax[cuda12], a Llama of 1.2 billion parameters (Llama 3.2's sizes) in bfloat16, 4 rows of 2048 tokens. With
--long LoRA on all linear layers, rank 16, bfloat16, remat, one row; --tpu needs libtpu, which jax[tpu] brings.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import optax

from peft_jax import chain, full, houlsby, ia3, lora, make_mesh, plan, prefix, quantize
from peft_jax.models import GPT2, CausalLM, Encoder, EncoderConfig, GPT2Config, Head, LlamaConfig
from peft_jax.planner import breakdown, h100, shapes, sum_of_parts, tpu
from peft_jax.planner.shapes import as_model
from peft_jax.train.loss import cross_entropy

MODELS = {
    "llama": CausalLM(LlamaConfig(2048, 256, 688, 6, 4, 2, 64, 1e-5, 1e4, 512, True)),
    "gpt2": GPT2(GPT2Config(2048, 256, 1024, 6, 4, 512)),
    "bert": Encoder(EncoderConfig(2048, 256, 1024, 6, 4, 512, head=Head("SEQ_CLS", 3))),
}
# What a method changes is called otherwise in each model.
IA3 = {"llama": {}, "gpt2": {"target_modules": ("c_attn", "mlp.c_proj"), "feedforward_modules": ("mlp.c_proj",)},
       "bert": {"target_modules": ("key", "value", "output.dense"), "feedforward_modules": ("output.dense",)}}
PLACES = {"llama": {}, "gpt2": {"attention_modules": ("attn",), "output_modules": ("mlp",)},
          "bert": {"attention_modules": ("attention.output.dense",), "output_modules": ("output.dense",)}}
METHODS = {
    "full": lambda model: full(),
    "lora": lambda model: lora(r=8, target_modules="all-linear"),
    "qlora": lambda model: chain(quantize("nf4", double_quant=True), lora(r=8, target_modules="all-linear")),
    "houlsby": lambda model: houlsby(**PLACES[model]),
    "prefix": lambda model: prefix(num_virtual_tokens=16),
    "ia3": lambda model: ia3(**IA3[model]),
}
CASES = [(model, method, remat) for model in MODELS for method in METHODS for remat in (False, True)]


LARGE = LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 5e5, 8192, True)
ON_H100 = [*((method, remat, attention) for method in ("lora", "qlora") for remat in (False, True)
             for attention in ("auto", "xla")), *((method, True, "auto") for method in ("full", "houlsby", "ia3"))]

LLAMA_8B = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, 131072, False)
LONG = [(attention, packed, seq) for attention, packed in (("auto", False), ("auto", True), ("xla", False))
        for seq in (2048, 8192, 32768)]


def found(model: str, method: str, remat: bool):
    """The plan of one case."""
    return plan(METHODS[method](model), MODELS[model], optax.adamw(1e-4), batch=8, seq=128, remat=remat,
                answers=1 if model == "bert" else None)


def on_h100() -> None:
    """Print the table of the plans for an H100."""
    target = h100()
    if target is None:
        raise SystemExit("jax's CUDA plugin is not installed: pip install 'jax[cuda12]', and set JAX_PLATFORMS=cpu")
    print("| method | remat | attention | sum of parts, GB | compiled, GB | ratio |\n|---|---|---|---|---|---|")
    for method, remat, attention in ON_H100:
        sizes = dataclasses.replace(LARGE, attn_implementation=attention)
        one = plan(METHODS[method]("llama"), sizes, optax.adamw(1e-4), 4, 2048, None, remat, dtype="bfloat16",
                   param_dtype="bfloat16", target=target)
        total = one.program.memory.total
        print(f"| {method} | {'yes' if remat else 'no'} | {one.assumed['attention']} | {one.sum / 1e9:.2f} | "
              f"{total / 1e9:.2f} | {one.sum / total:.3f} |", flush=True)


def long_rows(target) -> None:
    """Print the table of the sums of parts for one long row: nothing is compiled, ``target`` says which attention."""
    if target is None:
        raise SystemExit("what compiles for that device is not installed: see the head of this file")
    print(f"{target.name}\n\n| tokens | rows | attention | inside a layer, GB | sum of parts, GB |\n"
          "|---|---|---|---|---|")
    method = lora(r=16, target_modules="all-linear")
    for attention, packed, seq in LONG:
        sizes = dataclasses.replace(LLAMA_8B, attn_implementation=attention)
        given = shapes(as_model(sizes, "bfloat16", "bfloat16", True), method, optax.adamw(1e-4), 1, seq, target=target,
                       packed=packed)
        parts = sum_of_parts(given, 512, cross_entropy)
        layer = sum(part.bytes for part in parts if part.name.startswith("one layer"))
        print(f"| {seq:,} | {'packed' if packed else 'one text'} | {given.model.config.attn_implementation} | "
              f"{layer / 1e9:.1f} | {breakdown.total(parts) / 1e9:.1f} |", flush=True)


def on_meshes() -> None:
    """Print the table of the plans for 2 and 4 devices."""
    print("| method | data x fsdp x tensor | sum of parts, MB a device | compiled, MB a device | ratio |")
    print("|---" * 5 + "|")
    for method in ("full", "qlora"):
        for sizes in ((2, 1, 1), (1, 4, 1), (1, 1, 2)):
            one = plan(METHODS[method]("llama"), MODELS["llama"], optax.adamw(1e-4), 8, 128, make_mesh(*sizes), True)
            total = one.program.memory.total
            print(f"| {method} | {' x '.join(map(str, sizes))} | {one.sum / 1e6:.1f} | {total / 1e6:.1f} | "
                  f"{one.sum / total:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="words that a case's name holds, such as 'llama qlora'")
    parser.add_argument("--h100", action="store_true", help="compile for an H100")
    parser.add_argument("--long", action="store_true", help="Llama 3.1 8B with long rows, for an H100")
    parser.add_argument("--tpu", action="store_true", help="with --long: for a TPU")
    parser.add_argument("--mesh", action="store_true", help="on several devices")
    args = parser.parse_args()
    if args.mesh:
        return on_meshes()
    if args.h100:
        return on_h100()
    if args.long:
        return long_rows(tpu() if args.tpu else h100())
    words = args.only.split()
    print("| model | method | remat | sum of parts, MB | compiled, MB | ratio |\n|---|---|---|---|---|---|")
    for case in CASES:
        if all(word in f"{case[0]} {case[1]} remat={case[2]}" for word in words):
            one = found(*case)
            total = one.program.memory.total
            print(f"| {case[0]} | {case[1]} | {'yes' if case[2] else 'no'} | {one.sum / 1e6:.1f} | {total / 1e6:.1f} | "
                  f"{one.sum / total:.3f} |", flush=True)


if __name__ == "__main__":
    main()
