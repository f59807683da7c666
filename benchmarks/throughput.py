"""Tokens per second and model-FLOP utilisation of LoRA and QLoRA on one GPU, beside Hugging Face peft, in turn.

    python benchmarks/throughput.py                        # a random Llama of 1 B, sequence 2048, bfloat16, remat
    python benchmarks/throughput.py --size=8b --rows=1
    python benchmarks/throughput.py --size=tiny --length=64 --steps=2     # only that this script runs, on any machine

Random weights of Llama 3.2's 1 B and 3.1's 8 B sizes; LoRA r 16 on all linear layers, QLoRA the same on NF4 with double
quantisation; AdamW; loss on every token. Both libraries have the same rows; torch uses gradient checkpointing, too.
Prints medians of ``--steps`` steps, in turn, and utilisation: the FLOPs that the method needs over seconds and what
the card could do in bfloat16. Those are 4 N a token for N weights, and attention: forward, and the gradients of
activations; frozen weights have none, and remat counts for nothing. "Peak" is the most memory that jax held, beside
what the compiled program says and what ``peft_jax.plan`` said before; a CPU tells no peak. peft is left out, and that
is said, where it is not installed (``--alone``: asked to).
"""

import argparse
import importlib.util
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

from peft_jax import bind, chain, lora, plan, quantize
from peft_jax.core import tree
from peft_jax.models.llama import CausalLM, LlamaConfig
from peft_jax.planner.compiled import memory_of
from peft_jax.train.step import init_state, make_step

SIZES = {
    "tiny": LlamaConfig(512, 64, 128, 2, 4, 2, 16, 1e-5, 5e5, 8192, True),
    "1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 5e5, 8192, True),
    "8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, 8192, False),
}
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # FLOP/s, dense bfloat16, NVIDIA's datasheets
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def ours(sizes: LlamaConfig, quantised: bool, ids: np.ndarray):
    """(a function that runs one training step here, bytes that its program says it needs, bytes of the plan)."""
    model = CausalLM(sizes, jnp.bfloat16, jnp.bfloat16, remat=True)
    method = chain(quantize("nf4", double_quant=True), lora(**LORA)) if quantised else lora(**LORA)
    base = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = method.init(jax.random.key(1), base)
    del base
    trainable, frozen = tree.partition(params, method.labels(params))
    tx = optax.adamw(1e-4)
    step, state = make_step(bind(method, model), tx, 2048), init_state(trainable, tx, jax.random.key(2))
    whole = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    batch = {"input_ids": ids, "lengths": np.full(len(ids), ids.shape[1], np.int32), "positions": whole,
             "loss_index": whole[:, :-1], "loss_target": ids[:, 1:],
             "loss_weight": np.ones_like(whole[:, 1:], np.float32)}
    batch = jax.device_put({name: np.ascontiguousarray(array[None]) for name, array in batch.items()})
    compiled = memory_of(step.lower(state, frozen, batch).compile()).total
    planned = plan(method, model, tx, *ids.shape).program.memory.total

    def run():
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    return run, compiled, planned


def theirs(sizes: LlamaConfig, quantised: bool, ids: np.ndarray):
    """The same in torch and Hugging Face peft, with bitsandbytes for the quantised base."""
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers, num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads, head_dim=sizes.head_dim, max_position_embeddings=8192,
        tie_word_embeddings=sizes.tie_word_embeddings, use_cache=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    if quantised:  # as its users do: while loading, from a folder
        rules = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                bnb_4bit_use_double_quant=True,
                                                bnb_4bit_compute_dtype=torch.bfloat16)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device,
                                                                  quantization_config=rules)
    else:
        model = model.to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.tensor(ids, dtype=torch.long, device=device)

    def run():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def needed(sizes: LlamaConfig, rows: int, length: int) -> int:
    """FLOPs of a step that trains adapters alone: products with weights forward and back, causal attention."""
    c = sizes
    heads = c.num_attention_heads * c.head_dim
    layer = c.hidden_size * (2 * heads + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    weights = c.num_hidden_layers * layer + c.vocab_size * c.hidden_size
    attention = c.num_hidden_layers * heads * length  # half of 2 * length: what is masked is not needed
    return rows * length * (4 * weights + 2 * 3 * attention)


def peft_is_here() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))


def in_turn(runs: dict, steps: int) -> dict[str, float]:
    """Median seconds of a step of each, run in turn; the first two turns compile and warm up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(steps + 2):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            taken[name] += [time.perf_counter() - began] if turn > 1 else []
    return {name: statistics.median(times) for name, times in taken.items()}


def row(title: str, sizes: LlamaConfig, quantised: bool, ids: np.ndarray, args) -> str:
    run, compiled, planned = ours(sizes, quantised, ids)
    runs = {"ours": run} | ({} if args.alone else {"theirs": theirs(sizes, quantised, ids)})
    medians = in_turn(runs, args.steps)
    here, there = medians["ours"], medians.get("theirs")
    device = jax.devices()[0]
    peak = next((value for name, value in PEAKS.items() if name in device.device_kind), None)
    held = (device.memory_stats() or {}).get("peak_bytes_in_use")
    cells = [title, f"{ids.size / here:,.0f}", f"{100 * needed(sizes, *ids.shape) / here / peak:.1f} %" if peak else "",
             f"{held / 1e9:.3g}" if held else "", f"{compiled / 1e9:.3g}", f"{planned / 1e9:.3g}",
             f"{ids.size / there:,.0f}" if there else "", f"{here / there:.2f}" if there else ""]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1b", choices=SIZES)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", default="LoRA,QLoRA")
    parser.add_argument("--alone", action="store_true", help="without peft")
    args = parser.parse_args()
    sizes, kind = SIZES[args.size], jax.devices()[0].device_kind
    ids = np.random.default_rng(0).integers(0, sizes.vocab_size, (args.rows, args.length)).astype(np.int32)
    print(f"{args.size}, {args.rows} x {args.length} tokens, {kind}, jax {jax.__version__}")
    if not args.alone and not peft_is_here():
        args.alone = True
        print("without peft, which is not installed here")
    print("\n| | tokens/s | utilisation | peak, GB | compiled, GB | plan, GB | peft, tokens/s | ratio of step times |\n"
          + "|---" * 8 + "|")
    for name in args.methods.split(","):
        print(row(name, sizes, name == "QLoRA", ids, args), flush=True)


if __name__ == "__main__":
    main()
