"""Bottleneck adapters with the tensors of AdapterHub's ``adapters`` give its logits (tests/golden/make_adapters.py)."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import (
    bind,
    compacter,
    flatten,
    houlsby,
    load_adapter,
    parallel_adapter,
    partition,
    pfeiffer,
    save_adapter,
    unflatten,
)
from peft_jax.hub.families.hf_names import tensors
from peft_jax.hub.families.llama import MODULES
from tests import peer, properties

# The methods whose arguments say the same as those of the cases in tests/golden/make_adapters.py.
CASES = {
    "houlsby": houlsby(4, "swish"),
    "houlsby-options": houlsby(4, ln_before=True, ln_after=True, scaling="learned", leave_out=1),
    "pfeiffer": pfeiffer(4),
    "pfeiffer-both": pfeiffer(4, "tanh", mh_adapter=True, scaling=2.0),
    "parallel": parallel_adapter(),
    "parallel-options": parallel_adapter(2, "leakyrelu", mh_adapter=True, ln_before=True, ln_after=True,
                                         scaling="channel"),
    "compacter": compacter(2),
    "compacter-plus-plus": compacter(2, phm_dim=2, factorized_phm_rule=True, phm_rank=3, mh_adapter=False,
                                     original_ln_before=True),
    "compacter-unshared": compacter(2, phm_dim=2, shared_phm_rule=False, phm_bias=False, factorized_phm_W=False),
}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).parents[2] / "golden" / "adapters.npz"))


def file_keys(case, key):
    """A name of AdapterHub's as our file has it."""
    key = key.replace(f".adapters.{case}.", ".").replace(f"shared_parameters.{case}.", "")
    key = key.replace("attention_adapters", "self_attn").replace("output_adapters", "mlp").removeprefix("model.")
    key = key.replace(".adapter_down.0.", ".adapter_down.").replace(".adapter_down.1.", ".adapter_down.")
    key = key.removesuffix("scaling") + "adapter_scale" if key.endswith(".scaling") else key
    return "base_model.model." + (f"model.{key}" if key.startswith("layers") else key)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_are_adapterhubs(golden, peer_bases, case, tmp_path):
    """Its tensors, under our file's names, load here and give its logits: placement, equation and file in one."""
    from safetensors.numpy import save_file

    _, model, shapes = peer_bases["llama"]
    places = tensors(MODULES, list(flatten(shapes)), 3)
    base = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(shapes).items()}
    for key, place in places.items():
        value = golden[f"base/{key}"]
        base[place.path][slice(None) if place.layer is None else place.layer] = value.T if place.transposed else value
    base = jax.tree.map(jnp.asarray, unflatten(base))
    method = CASES[case]
    save_adapter(tmp_path, method, model, method.init(jax.random.key(0), base))
    held = {file_keys(case, key.removeprefix(f"{case}/")): value for key, value in golden.items()
            if key.startswith(f"{case}/") and not key.endswith("/logits")}
    save_file({key: np.ascontiguousarray(value) for key, value in held.items()}, tmp_path / "adapter_model.safetensors")
    again, params = load_adapter(tmp_path, base)
    peer.assert_close(peer.bound_logits(again, model, params), golden[f"{case}/logits"])
    trainable, _ = partition(params, again.labels(params))
    assert peft_jax.count(trainable) - again.padding(params) == sum(value.size for value in held.values())


SMOLLM2 = {"houlsby": houlsby(9, "swish"), "pfeiffer": pfeiffer(9), "parallel": parallel_adapter(9),
           "compacter": compacter(9)}


def drawn(name, shape):
    """As in tests/golden/make_adapters.py."""
    deviation = 0.2 if "W_" in name or "phm_rule" in name else 0.02
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32) * deviation


@pytest.mark.real
def test_smollm2_gives_adapterhubs_logits(smollm2, tmp_path):
    """The real model, adapters of drawn tensors: the logits that are in the golden file."""
    from safetensors.numpy import load_file, save_file

    model, base, _ = smollm2
    golden = np.load(Path(__file__).parents[2] / "golden" / "adapters_smollm2.npz")
    ids = np.arange(12)[None] * 997 % 49152
    plain = model.apply({"params": base}, ids)[:, -4:, ::64]
    for case, method in SMOLLM2.items():
        folder = tmp_path / case
        save_adapter(folder, method, model, method.init(jax.random.key(0), base))
        file = folder / "adapter_model.safetensors"
        held = load_file(file)
        save_file({key: drawn(key.removeprefix("base_model.model.").removeprefix("model."), value.shape)
                   for key, value in held.items()}, file)
        again, params = load_adapter(folder, base)
        ours = bind(again, model)({"params": params}, ids)[:, -4:, ::64]
        peer.assert_close(ours, golden[case])
        assert np.abs(plain - golden[case]).max() > 0.02 * np.abs(plain).max()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_are_the_same_bits(peer_bases, case, tmp_path):
    _, model, base = peer_bases["qwen2"]
    method = CASES[case]
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, tuned)
    peer.check_same_bits(model, base, method, tuned, tmp_path)
    assert load_adapter(tmp_path, base)[0].config == method.config


