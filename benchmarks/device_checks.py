"""On an accelerator: each program that only it runs, against the plain one; exit code 1 where one is off.

    python benchmarks/device_checks.py
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.attention import arrays_of, program
from peft_jax import bind, chain, combine, lora, make_mesh, partition, quantize, quantize_array
from peft_jax.models.attention import flash_lacks
from peft_jax.models.llama import CausalLM, LlamaConfig
from peft_jax.parallel import partitioning
from peft_jax.quant import dot
from peft_jax.quant.pallas import why_plain

SIZES = LlamaConfig(512, 256, 512, 2, 4, 2, 64, 1e-5, 1e4, 512, True)
MOST = 2**-5  # of the largest value: a few roundings to bfloat16


class NotHere(Exception):
    """What this device lacks for a check, in words."""


def flash_attention() -> float:
    """Gradients of cuDNN's program with a mask, with is_causal and with lengths, against XLA's."""
    if why := flash_lacks(jax.ShapeDtypeStruct((1, 2, 8, 64), jnp.bfloat16)):
        raise NotHere(f"wants {why}")
    arrays = arrays_of(2, 128, (8, 2), 64, jnp.bfloat16)
    reference = program("mask", "xla")(*arrays)
    return max(off(program(how, "cudnn")(*arrays), reference) for how in ("mask", "causal", "lengths"))


def fused_product() -> float:
    """Forward and gradient of the fused kernel, every type, against the plain product."""
    weight = jax.random.normal(jax.random.key(0), (512, 256))

    def both(leaf, x):
        y, pull = jax.vjp(jax.jit(lambda x: dot(x, leaf, x.dtype)), x)
        return y, pull(y)[0]

    wrong = []
    for kind, tokens in (("nf4", 1), ("fp4", 64), ("int4", 300), ("int8", 16)):
        leaf = quantize_array(weight, kind, block_size=64, double_quant=True)
        x = jax.random.normal(jax.random.key(1), (tokens, 512)).astype(jnp.bfloat16)
        if why := why_plain(leaf, x.dtype):
            raise NotHere(why)
        wrong.append(off(both(dataclasses.replace(leaf, product="fused"), x), both(leaf, x)))
    return max(wrong)


def loss_of(method, model, params, ids, mesh=None):
    trainable, frozen = partition(params, method)
    apply = bind(method, model, mesh)

    def loss(leaves):
        logits = apply({"params": combine(frozen, leaves)}, ids).astype(jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1).mean()

    return jax.jit(jax.value_and_grad(loss))(trainable)


def quantised_model() -> float:
    """QLoRA's loss and gradients on this device, against the same on the CPU of this machine, in float32."""
    model, method = CausalLM(SIZES), chain(quantize("nf4", double_quant=True), lora(r=4, init_lora_weights=False))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 512, (2, 64)))
    with jax.default_device(jax.devices("cpu")[0]):
        params = method.init(jax.random.key(1), model.init(jax.random.key(0), ids)["params"])
        expected = loss_of(method, model, params, ids)
    return off(loss_of(method, model, jax.device_put(params, jax.devices()[0]), ids), expected)


def mesh_of_one() -> float:
    """A training gradient on a mesh of this one device, against none."""
    model, method = CausalLM(SIZES), lora(r=4, init_lora_weights=False)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 512, (2, 64)))
    params = method.init(jax.random.key(1), model.init(jax.random.key(0), ids)["params"])
    mesh = make_mesh(1, 1, 1)
    placed = partitioning.put(params, partitioning.by_rules(params, mesh, model.sharding, method))
    return off(loss_of(method, model, placed, ids, mesh), loss_of(method, model, params, ids))


def off(one, other) -> float:
    """The largest difference of two trees, as a share of the largest value of its leaf."""
    pairs = [(np.asarray(a, np.float32), np.asarray(b, np.float32))
             for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    return max(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-9)) for a, b in pairs)


CHECKS = {"flash attention": flash_attention, "fused products": fused_product, "QLoRA": quantised_model,
          "a mesh of one": mesh_of_one}


def verdict(check) -> tuple[bool, str]:
    """(whether it is in order, a row's cells); a check that ends in an error is not, and the others go on."""
    try:
        found = check()
    except NotHere as why:
        return True, f"| not here: {why}"
    except Exception as error:  # whatever a compiler or a device says
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        return False, f"| FAILED: {words[:200].replace('|', '/')}"
    return found <= MOST, f"{found:.2g} | {'right' if found <= MOST else 'WRONG'}"


def main() -> int:
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n\n| program | off by, of the largest | |\n"
          "|---|---|---|")
    wrong = 0
    for name, check in CHECKS.items():
        right, cells = verdict(check)
        wrong += not right
        print(f"| {name} | {cells} |", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
