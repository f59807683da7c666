"""What the metadata of a ``.gguf`` file say of a model of the Llama architecture, as a Hugging Face config.json."""

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.errors import PeftJaxError
from peft_jax.hub import model_config
from peft_jax.hub.formats import gguf_header
from peft_jax.models import rope

FREQUENCIES = "rope_freqs.weight"

# What a value may be, in words.
SIZE, ID, NUMBER, TEXT, FLAG = "a whole number from 1", "the number of a token", "a number above 0", "a text", "a flag"
TEXTS, IDS = "a list of texts", "a list of whole numbers"
KINDS: dict[str, Callable[[Any], bool]] = {
    SIZE: lambda value: type(value) is int and 1 <= value <= 1 << 24,
    ID: lambda value: type(value) is int and 0 <= value <= 1 << 24,
    NUMBER: lambda value: type(value) in (int, float) and 0 < value < 1e30,
    TEXT: lambda value: isinstance(value, str),
    FLAG: lambda value: isinstance(value, bool),
    TEXTS: lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    IDS: lambda value: isinstance(value, list) and all(type(one) is int for one in value),
}
# Keys of the architecture that are read, and those that change nothing beside them; all others may.
_KEYS = {f"llama.{key}" for key in (
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "expert_count",
    "feed_forward_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.factor", "rope.scaling.type",
    "attention.causal", "expert_used_count", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "tensor_data_layout", "vocab_size")}

# A GGUF file keeps the frequencies that Llama 3.1's rope scaling yields, not the scaling: find the one that does.
_LLAMA3_SCALINGS = [
    (("factor", factor), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
     ("original_max_position_embeddings", 8192), ("rope_type", "llama3"))
    for factor in (8.0, 32.0)
]


def config_of(header: gguf_header.Header, path: Path) -> dict[str, Any]:
    """The Hugging Face config dict that the metadata come to. Raises ``PeftJaxError``, naming the key, where not."""
    fields, names = header.fields, header.tensors
    _check_kind(fields, path)

    def value(key: str, kind: str = SIZE, *default: Any) -> Any:
        return checked(fields, f"llama.{key}", kind, path, *default)

    heads, width = value("attention.head_count"), value("embedding_length")
    result = {
        "model_type": "llama",
        "vocab_size": _rows(names, path),
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", SIZE, heads),
        "head_dim": _head_dim(value, width // heads, path),
        # Stored as float32: the shortest decimal that reads back as the same float32 is the one that was meant.
        "rms_norm_eps": float(str(np.float32(value("attention.layer_norm_rms_epsilon", NUMBER)))),
        "rope_theta": float(value("rope.freq_base", NUMBER, 10000.0)),
        "max_position_embeddings": value("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }
    try:
        model_config.from_hf(result)
        result["rope_scaling"] = _rope_scaling(fields, names, result, path)
        return model_config.to_hf(model_config.from_hf(result), token_ids=_token_ids(fields, path))
    except PeftJaxError as error:
        raise PeftJaxError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _check_kind(fields: dict[str, Any], path: Path) -> None:
    kind = fields.get("general.architecture", "unknown")
    if kind != "llama" or fields.get("llama.expert_count"):
        raise PeftJaxError(f"{path} holds a model of architecture '{kind!s:.60}'{' with experts' * (kind == 'llama')}: "
                           "of GGUF files only plain 'llama' ones are read; use the model's safetensors folder "
                           "instead.")
    if odd := [key for key in fields if key.startswith("llama.") and key not in _KEYS]:
        raise PeftJaxError(f"{path} has '{odd[0]:.60}', which may change what the model computes and is not read: use "
                           "the model's safetensors folder instead.")


def _head_dim(value: Callable[..., Any], default: int, path: Path) -> int:
    rotated = value("rope.dimension_count", SIZE, None)
    size = value("attention.key_length", SIZE, rotated or default)
    others = {"llama.rope.dimension_count": rotated or size,
              "llama.attention.value_length": value("attention.value_length", SIZE, size)}
    for key, other in others.items():
        if other != size:
            raise PeftJaxError(f"{path} has '{key}' = {other} where heads have {size} values: such heads are not read; "
                               "use the model's safetensors folder instead.")
    return size


def _rows(names: dict[str, gguf_header.Info], path: Path) -> int:
    if "token_embd.weight" not in names or len(names["token_embd.weight"].shape) != 2:
        raise PeftJaxError(f"{path} has no table of embeddings 'token_embd.weight': it holds no whole model; fetch it "
                           "again.")
    return names["token_embd.weight"].shape[0]


def checked(fields: dict[str, Any], key: str, kind: str, path: Path, *default: Any) -> Any:
    """The value of a key. Raises ``PeftJaxError`` where it is not of the ``kind``, one of ``KINDS``, or is not there
    and there is no ``default``."""
    if key not in fields and default:
        return default[0]
    if key not in fields:
        raise PeftJaxError(f"{path} has no '{key}', {kind}, without which it cannot be read: fetch it again, or use "
                           "the model's safetensors folder instead.")
    if not KINDS[kind](fields[key]):
        raise PeftJaxError(f"{path} has '{key}' = {reprlib.repr(fields[key])}, where {kind} belongs: fetch it again, "
                           "or use the model's safetensors folder instead.")
    return fields[key]


def _token_ids(fields: dict[str, Any], path: Path) -> dict[str, int | None]:
    theirs = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {ours: checked(fields, f"tokenizer.ggml.{key}", ID, path, None) for ours, key in theirs.items()}


def _rope_scaling(fields: dict[str, Any], names: dict[str, gguf_header.Info], config: dict[str, Any],
                  path: Path) -> dict | None:
    kind = checked(fields, "llama.rope.scaling.type", TEXT, path, "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": checked(fields, "llama.rope.scaling.factor", NUMBER, path)}
    if kind != "none" or "llama.rope.scaling.factor" in fields:
        raise PeftJaxError(f"{path} has rope scaling '{kind:.60}', which is not read from GGUF files: use the model's "
                           "safetensors folder instead.")
    if FREQUENCIES not in names:
        return None
    divisors = names[FREQUENCIES].floats()
    plain = rope.inverse_frequencies(config["head_dim"], config["rope_theta"], None)
    for scaling in _LLAMA3_SCALINGS:
        scaled = rope.inverse_frequencies(config["head_dim"], config["rope_theta"], scaling)
        if divisors.shape == plain.shape and (divisors > 0).all() and np.allclose(plain / divisors, scaled, rtol=1e-4):
            return dict(scaling)
    raise PeftJaxError(f"{path} carries rope frequencies that are not those of Llama 3.1 or 3.2: use the model's "
                       "safetensors folder instead.")
