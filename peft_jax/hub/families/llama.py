"""The Llama family at Hugging Face: its ``config.json`` to ``LlamaConfig`` and back, its modules' names."""

import reprlib
from collections.abc import Mapping
from typing import Any

from peft_jax.core.validation import is_finite
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.hub.families.family import Family, check_heads, completed
from peft_jax.hub.families.hf_names import embedding, linear, norm
from peft_jax.models.llama import CausalLM, LlamaConfig
from peft_jax.models.rope import SCALINGS

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What a config.json that leaves a key out means: the defaults of transformers' configuration classes.
_COMMON = {
    "hidden_act": "silu",
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
         "num_key_value_heads": 32}
DEFAULTS = {
    "llama": {**_COMMON, "max_position_embeddings": 2048},
    "mistral": {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_COMMON, **_QWEN, "max_position_embeddings": 32768},
    "qwen3": {**_COMMON, **_QWEN, "max_position_embeddings": 32768, "head_dim": 128},
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


MODULES = {
    "embed_tokens": embedding("model.embed_tokens"),
    "layers/input_layernorm": norm("model.layers.{}.input_layernorm"),
    "layers/self_attn/q_proj": linear("model.layers.{}.self_attn.q_proj"),
    "layers/self_attn/k_proj": linear("model.layers.{}.self_attn.k_proj"),
    "layers/self_attn/v_proj": linear("model.layers.{}.self_attn.v_proj"),
    "layers/self_attn/o_proj": linear("model.layers.{}.self_attn.o_proj"),
    "layers/self_attn/q_norm": norm("model.layers.{}.self_attn.q_norm"),
    "layers/self_attn/k_norm": norm("model.layers.{}.self_attn.k_norm"),
    "layers/post_attention_layernorm": norm("model.layers.{}.post_attention_layernorm"),
    "layers/mlp/gate_proj": linear("model.layers.{}.mlp.gate_proj"),
    "layers/mlp/up_proj": linear("model.layers.{}.mlp.up_proj"),
    "layers/mlp/down_proj": linear("model.layers.{}.mlp.down_proj"),
    "norm": norm("model.norm"),
    "lm_head": linear("lm_head"),
}


def read(kind: str, given: Mapping[str, Any]) -> LlamaConfig:
    """The model that a config dict of type ``kind`` describes.

    Raises ``PeftJaxError`` for a missing size or a feature that is not supported (activation, rope scaling, partial
    rotary, layer types).
    """
    c = completed(kind, given, _REQUIRED, DEFAULTS[kind])
    if c["hidden_act"] not in ("silu", "swish"):
        raise PeftJaxError(f"hidden_act '{c['hidden_act']}' is not supported in a {kind} model: only silu is.")
    _check_heads(kind, c)
    heads = c["num_attention_heads"]
    theta, scaling = _rope(c)
    window, windowed = _window(kind, c)
    return LlamaConfig(
        **{key: c[key] for key in _REQUIRED},
        num_key_value_heads=heads if c["num_key_value_heads"] is None else c["num_key_value_heads"],
        head_dim=c["hidden_size"] // heads if c["head_dim"] is None else c["head_dim"],
        rms_norm_eps=c["rms_norm_eps"],
        rope_theta=theta,
        max_position_embeddings=c["max_position_embeddings"],
        tie_word_embeddings=c["tie_word_embeddings"],
        rope_scaling=scaling,
        qkv_bias=kind == "qwen2" or (kind != "mistral" and c["attention_bias"]),
        out_bias=kind in ("llama", "qwen3") and c["attention_bias"],
        mlp_bias=kind == "llama" and c["mlp_bias"],
        qk_norm=kind == "qwen3",
        sliding_window=window,
        sliding_layers=windowed,
        model_type=kind,
    )


def _check_heads(kind: str, c: Mapping[str, Any]) -> None:
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    if c["head_dim"] is None:
        check_heads(kind, c["hidden_size"], heads)
    if groups and heads % groups:
        raise PeftJaxError(f"the {kind} config has num_attention_heads={heads}, no multiple of num_key_value_heads="
                           f"{groups}: correct config.json.")
    if (c["head_dim"] or c["hidden_size"] // heads) % 2:
        raise PeftJaxError(f"the {kind} config gives heads of an odd number of values, and rotary positions turn "
                           "pairs: correct config.json.")


def write(config: LlamaConfig) -> dict[str, Any]:
    """The config dict; both spellings of the rope parameters are given, for old releases of transformers and new."""
    kind, window = config.model_type, config.sliding_window
    theta, scaling = {"rope_theta": config.rope_theta}, dict(config.rope_scaling) if config.rope_scaling else None
    result = {
        "architectures": [ARCHITECTURES[kind]],
        **{key: getattr(config, key) for key in (*_REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps")},
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        **theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), **theta},
    }
    if kind in ("llama", "qwen3"):
        result["attention_bias"] = config.qkv_bias
    if kind == "llama":
        result["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        result["sliding_window"] = window
    if kind in ("qwen2", "qwen3"):
        result |= _qwen_window(config)
    return result


def _rope(c: Mapping[str, Any]) -> tuple[float, tuple[tuple[str, float | str], ...] | None]:
    """theta, and the scaling's sorted items or ``None``. transformers 5 keeps both in one dict, 4 in two keys."""
    given = _rope_fields(c)
    theta, partial, kind = given["rope_theta"], given["partial_rotary_factor"], given["rope_type"]
    if not is_finite(theta) or theta <= 0:
        raise PeftJaxError(f"rope_theta {reprlib.repr(theta)} is no number above 0: correct config.json.")
    if partial not in (None, 1.0):
        raise PeftJaxError(f"partial_rotary_factor {reprlib.repr(partial)} is not supported: only whole heads are "
                           "rotated.")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise PeftJaxError(f"rope scaling '{kind!s:.60}' is not supported: {nearest(str(kind), SCALINGS)}")
    if kind == "default":
        return float(theta), None
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    missing = [key for key in _SCALING_KEYS[kind] if not is_finite(given.get(key)) or given[key] <= 0]
    if missing or given.get("high_freq_factor", 2) <= given.get("low_freq_factor", 1):
        raise PeftJaxError(f"rope scaling '{kind}' lacks {', '.join(missing) or 'a high_freq_factor above the low'}, "
                           "a number above 0: add it in config.json.")
    return float(theta), tuple((key, given[key]) for key in sorted(("rope_type", *_SCALING_KEYS[kind])))


def _rope_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of rotary positions, in one dict. Raises ``PeftJaxError`` where it says two things."""
    plain = {key: c[key] for key in ("rope_theta", "partial_rotary_factor")}
    stated = [{**plain, "rope_type": one.get("type", "default"), **one} for key in ("rope_scaling", "rope_parameters")
              if (one := c[key])]
    for one in stated:
        one.pop("type", None)
    if len(stated) == 2 and stated[0] != stated[1]:
        raise PeftJaxError("rope_scaling and rope_parameters of config.json say two things of the rotary positions: "
                           "leave one of them out.")
    return stated[0] if stated else {**plain, "rope_type": "default"}


_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _window(kind: str, c: Mapping[str, Any]) -> tuple[int | None, tuple[bool, ...]]:
    """The window in tokens and which layers have it; ``(None, ())`` where none has."""
    layers, window = c["num_hidden_layers"], c.get("sliding_window")
    if kind == "mistral":
        windowed = (window is not None,) * layers
    elif kind in ("qwen2", "qwen3"):
        window = window if c["use_sliding_window"] else None
        words = c["layer_types"] or [
            "sliding_attention" if window is not None and layer >= c["max_window_layers"] else "full_attention"
            for layer in range(layers)
        ]
        odd = set(words) - {"sliding_attention", "full_attention"}
        if odd or len(words) != layers:
            raise PeftJaxError(f"layer_types must say full_attention or sliding_attention for each of {layers} layers.")
        windowed = tuple(word == "sliding_attention" and window is not None for word in words)
    else:
        windowed = ()
    return (window, windowed) if any(windowed) else (None, ())


def _qwen_window(config: LlamaConfig) -> dict[str, Any]:
    flags = config.sliding_layers or (False,) * config.num_hidden_layers
    return {
        "use_sliding_window": any(flags),
        "sliding_window": config.sliding_window,
        "max_window_layers": flags.index(True) if any(flags) else config.num_hidden_layers,
        "layer_types": ["sliding_attention" if flag else "full_attention" for flag in flags],
    }


FAMILY = Family(ARCHITECTURES, read, write, CausalLM, MODULES, "model.", tied="embed_tokens/embedding")
