"""GPT-2 at Hugging Face: its ``config.json`` to ``GPT2Config`` and back, its modules' names.

Its projections are Conv1D there, which keeps a weight as (in, out), like a Flax kernel and unlike torch's Linear.
"""

from collections.abc import Mapping
from typing import Any

from peft_jax.errors import PeftJaxError
from peft_jax.hub.families.family import Family, check_heads, completed
from peft_jax.hub.families.hf_names import conv1d, embedding, linear, norm
from peft_jax.models.gpt2 import GPT2, GPT2Config

# GPT2Config's field: the key in config.json.
KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "n_embd", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
    "layer_norm_epsilon": "layer_norm_epsilon", "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
_REQUIRED = ("vocab_size", "n_embd", "n_layer", "n_head")

# What a config.json that leaves a key out means: the defaults of transformers' configuration class.
DEFAULTS = {"n_positions": 1024, "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
            "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False}
# The values that the model computes with.
_FIXED = {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
          "add_cross_attention": False}


def read(kind: str, given: Mapping[str, Any]) -> GPT2Config:
    """The model that a config dict describes. Raises ``PeftJaxError`` for a missing size or an unsupported feature."""
    c = completed(kind, given, _REQUIRED, DEFAULTS)
    check_heads(kind, c["n_embd"], c["n_head"])
    odd = [f"{key}={c[key]!r}" for key, value in _FIXED.items() if c[key] != value]
    if odd:
        raise PeftJaxError(f"a {kind} model with {', '.join(odd)} is not supported: only "
                           f"{', '.join(f'{key}={value!r}' for key, value in _FIXED.items())} is.")
    inner = 4 * c["n_embd"] if c["n_inner"] is None else c["n_inner"]
    return GPT2Config(**{name: c[key] for name, key in KEYS.items()}, intermediate_size=inner, model_type=kind)


def write(config: GPT2Config) -> dict[str, Any]:
    """The config dict."""
    return {"architectures": ["GPT2LMHeadModel"], **{key: getattr(config, name) for name, key in KEYS.items()},
            "n_inner": config.intermediate_size, **_FIXED}


MODULES = {
    "wte": embedding("transformer.wte"),
    "wpe": embedding("transformer.wpe"),
    "h/ln_1": norm("transformer.h.{}.ln_1"),
    "h/attn/c_attn": conv1d("transformer.h.{}.attn.c_attn"),
    "h/attn/c_proj": conv1d("transformer.h.{}.attn.c_proj"),
    "h/ln_2": norm("transformer.h.{}.ln_2"),
    "h/mlp/c_fc": conv1d("transformer.h.{}.mlp.c_fc"),
    "h/mlp/c_proj": conv1d("transformer.h.{}.mlp.c_proj"),
    "ln_f": norm("transformer.ln_f"),
    "lm_head": linear("lm_head"),
}

FAMILY = Family({"gpt2": "GPT2LMHeadModel"}, read, write, GPT2, MODULES, "transformer.", tied="wte/embedding")
