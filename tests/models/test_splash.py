"""Splash attention, in Pallas' interpreter, against the plain program: forward, gradients, in a model, on a mesh."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax import PeftJaxError, combine, lora, make_mesh, partition
from peft_jax.binding.linen import bind
from peft_jax.models import attention, masks, splash
from peft_jax.models.llama import CausalLM, LlamaConfig

T = 256
IDS = jnp.where(jnp.arange(T) < 100, 1, jnp.where(jnp.arange(T) < 230, 2, 0))[None].repeat(2, 0)
LENGTHS = jnp.array([256, 100])
MASKS = {
    "lengths": masks.RowMask(T, True, LENGTHS), "segments": masks.RowMask(T, True, segment_ids=IDS),
    "a window": masks.RowMask(T, True, window=50),
    "windows that differ": masks.RowMask(T, True, segment_ids=IDS, window=50, windowed=jnp.array(True)),
    "both ways, keys in front": masks.RowMask(T, False, LENGTHS).behind(128),
    "keys in front": masks.RowMask(T, True).behind(128),
}


def arrays(rows, keys=T, size=16):
    return [jax.random.normal(jax.random.key(i), (rows, tokens, heads, size))
            for i, (tokens, heads) in enumerate(((T, 4), (keys, 2), (keys, 2)))]


def gradients(attend, mask):
    """``(query, key, value) -> (output, their gradients)``, of real tokens."""
    real = jnp.ones((1, T), bool)
    if mask.packed:
        real = mask.segment_ids > 0
    elif mask.lengths is not None:
        real = jnp.arange(T) < (mask.lengths - (mask.keys - T))[:, None]

    def loss(*given):
        out = jnp.where(real[..., None, None], attend(*given, mask), 0)
        return (out ** 2).sum(), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_it_is_the_plain_program(name, monkeypatch):
    monkeypatch.setattr(splash, "BLOCK_MOST", 128)  # several blocks
    given = arrays(2, MASKS[name].keys)
    found = gradients(splash.attend, MASKS[name])(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(gradients(attention._xla, MASKS[name])(*given))):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.slow
def test_a_mesh_cuts_it_between_rows_and_between_heads():
    mesh, mask = make_mesh(2, 1, 2), MASKS["segments"]
    cutting = replace(mask, mesh=mesh)
    cut = [jax.device_put(one, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")))
           for one in arrays(2)]
    program = gradients(splash.attend, cutting).lower(*cut).compile()
    assert not any(word in program.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
    expected = gradients(attention._xla, mask)(*arrays(2))
    for one, other in zip(jax.tree.leaves(program(*cut)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes_of_mesh", [None, (2, 1, 2)])
def test_a_model_trains_with_it_under_scan_and_remat_and_on_a_mesh(sizes_of_mesh):
    sizes = LlamaConfig(64, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 512, True, sliding_window=20, sliding_layers=(True, False))
    ids = np.random.default_rng(0).integers(0, 64, (2, 128))
    base = CausalLM(sizes).init(jax.random.key(0), ids)["params"]
    method = lora(r=2, init_lora_weights=False)
    trainable, frozen = partition(method.init(jax.random.key(1), base), method)

    def loss(implementation, leaves):
        model = CausalLM(replace(sizes, attn_implementation=implementation), remat=True)
        mesh = make_mesh(*sizes_of_mesh) if sizes_of_mesh and implementation == "splash" else None
        states = bind(method, model, mesh)({"params": combine(frozen, leaves)}, ids, lengths=np.array([128, 70]),
                                           method="hidden")
        return (states[0] ** 3).sum() + (states[1, :70] ** 3).sum()

    (found, by), (expected, plain) = (jax.jit(jax.value_and_grad(partial(loss, name)))(trainable)
                                      for name in ("splash", "xla"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(by), jax.tree.leaves(plain)):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


@pytest.mark.slow
def test_odd_rows_say_what_to_set_and_short_ones_and_arrays_are_the_plain_programs():
    long, short = ([one[:, :tokens] for one in arrays(1)] for tokens in (144, 96))
    with pytest.raises(PeftJaxError, match=r"a multiple of 128 tokens a row, not 144: set data\.width_multiple=128"):
        splash.attend(*long, masks.RowMask(144, True))
    expected = attention._xla(*short, masks.RowMask(96, True))
    np.testing.assert_array_equal(splash.attend(*short, masks.RowMask(96, True)), expected)
    np.testing.assert_array_equal(splash.attend(*short, jnp.tril(jnp.ones((1, 1, 96, 96), bool))), expected)
