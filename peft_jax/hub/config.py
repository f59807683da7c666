"""Hugging Face's ``config.json`` to ``LlamaConfig`` and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax import tree
from peft_jax.errors import PeftJaxError, nearest
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
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
DEFAULTS = {
    "llama": {**_COMMON, "max_position_embeddings": 2048},
    "mistral": {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_COMMON, **_QWEN, "max_position_embeddings": 32768},
    "qwen3": {**_COMMON, **_QWEN, "max_position_embeddings": 32768, "head_dim": 128},
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read(folder: Path) -> dict[str, Any]:
    """The dict in ``folder/config.json``. Raises ``PeftJaxError`` where it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        held = [file.name for file in sorted(folder.glob("*.gguf"))]
        advice = f"it holds {held[0]}, name that file" if held else "name a folder that save_pretrained wrote"
        raise PeftJaxError(f"{folder} has no config.json: {advice}.")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ``PeftJaxError`` where it is damaged or no object."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PeftJaxError(f"{path} is not readable as JSON: {error}. Fetch it again.") from error
    if not isinstance(given, dict):
        raise PeftJaxError(f"{path} holds no JSON object: fetch it again.")
    return given


def from_hf(given: Mapping[str, Any]) -> LlamaConfig:
    """The model that a Hugging Face config dict describes.

    Raises:
      PeftJaxError: an architecture that is not among ``ARCHITECTURES`` (the message names the nearest), a missing size,
        or a feature of the architecture that is not supported (activation, rope scaling, partial rotary, layer types).
    """
    kind, c = _completed(given)
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


def to_hf(config: LlamaConfig, dtype: str = "float32", token_ids: Mapping[str, int | None] | None = None) -> dict:
    """The config dict that transformers reads, old releases and new: both spellings of the rope parameters are given.

    Args:
      dtype: the weights' type as torch names it: ``float32``, ``bfloat16``, ``float16``.
      token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``; ``None`` where unknown.

    Raises:
      PeftJaxError: a combination of fields that ``model_type`` cannot say.
    """
    kind, window = config.model_type, config.sliding_window
    theta, scaling = {"rope_theta": config.rope_theta}, dict(config.rope_scaling) if config.rope_scaling else None
    result = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{key: getattr(config, key) for key in (*_REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps")},
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        **theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), **theta},
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **(token_ids or {}),
    }
    if kind in ("llama", "qwen3"):
        result["attention_bias"] = config.qkv_bias
    if kind == "llama":
        result["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        result["sliding_window"] = window
    if kind in ("qwen2", "qwen3"):
        result |= _qwen_window(config)
    if from_hf(result) != config:
        raise PeftJaxError(f"this LlamaConfig cannot be written as a '{kind}' config.json: its biases, norms or "
                           f"windowed layers are not those of a {kind} model. Change model_type.")
    return result


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """``{path: shape}`` of the parameters of a pretrained model; a tied one has no ``lm_head``."""
    shapes = jax.eval_shape(CausalLM(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in tree.flatten(shapes).items()}


def _completed(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model type and the config with every key that is read here, checked."""
    kind = given["model_type"] if "model_type" in given else _kind_of(given)
    if kind not in ARCHITECTURES:
        raise PeftJaxError(f"model_type '{kind}' is not supported: {nearest(kind, ARCHITECTURES)}")
    missing = [key for key in _REQUIRED if key not in given]
    if missing:
        raise PeftJaxError(f"the {kind} config lacks {', '.join(missing)}: add it to config.json.")
    c = {**DEFAULTS[kind], **given}
    if c["hidden_act"] not in ("silu", "swish"):
        raise PeftJaxError(f"hidden_act '{c['hidden_act']}' is not supported in a {kind} model: only silu is.")
    return kind, c


def _kind_of(given: Mapping[str, Any]) -> str:
    names = given.get("architectures") or []
    kinds = [kind for kind, name in ARCHITECTURES.items() if name in names]
    if not kinds:
        raise PeftJaxError(f"config.json names no model_type; set it to one of: {', '.join(ARCHITECTURES)}.")
    return kinds[0]


def _rope(c: Mapping[str, Any]) -> tuple[float, tuple[tuple[str, float | str], ...] | None]:
    """theta, and the scaling's sorted items or ``None``. transformers 5 keeps both in one dict, 4 in two keys."""
    given = {"rope_theta": c["rope_theta"], "partial_rotary_factor": c["partial_rotary_factor"],
             **(c["rope_scaling"] or c["rope_parameters"] or {})}
    theta, partial = float(given.pop("rope_theta")), given.pop("partial_rotary_factor")
    old_word = given.pop("type", "default")
    kind = given.setdefault("rope_type", old_word)
    if partial not in (None, 1.0):
        raise PeftJaxError(f"partial_rotary_factor {partial} is not supported: only whole heads are rotated.")
    if kind not in SCALINGS:
        raise PeftJaxError(f"rope scaling '{kind}' is not supported: {nearest(kind, SCALINGS)}")
    if kind == "default":
        return theta, None
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    missing = [key for key in _SCALING_KEYS[kind] if key not in given]
    if missing:
        raise PeftJaxError(f"rope scaling '{kind}' lacks {', '.join(missing)}: add it in config.json.")
    return theta, tuple((key, given[key]) for key in sorted(("rope_type", *_SCALING_KEYS[kind])))


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
