"""Read a ``.gguf`` file (llama.cpp's format) of the Llama architecture.

The file is converted once into an ordinary Hugging Face folder in the cache (config.json, float32 safetensors,
tokenizer files), four bytes a parameter, which everything else then reads. Format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.core import files
from peft_jax.errors import PeftJaxError, needed
from peft_jax.hub import download, model_config
from peft_jax.models import rope

# Raise this when the conversion changes, so that old results in people's caches are not used.
_VERSION = 2
WEIGHTS, CHECKSUM = "model.safetensors", "sha256.json"

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# A GGUF file keeps the frequencies that Llama 3.1's rope scaling yields, not the scaling: find the one that does.
_LLAMA3_SCALINGS = [
    (("factor", factor), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
     ("original_max_position_embeddings", 8192), ("rope_type", "llama3"))
    for factor in (8.0, 32.0)
]


def convert(path: Path, weights: bool = False) -> Path:
    """The cached Hugging Face folder with the content of the ``.gguf`` file ``path``, made the first time.

    It is made anew where the file changed, and, if its ``weights`` are to be read, where they are not those that were
    written.

    Raises:
      PeftJaxError: the file is no GGUF file, another architecture, a vocabulary of a kind that is not read, or the
        cache folder cannot be written.
    """
    from filelock import FileLock

    folder = _cached(path)
    if not folder.is_dir() or (weights and not _is_whole(folder)):
        with FileLock(folder.with_name(f"{folder.name}.lock")):  # a second process waits here, then finds the folder
            if folder.is_dir() and not _is_whole(folder):
                files.remove(folder)
            if not folder.is_dir():
                _convert_into(folder, path)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        return files.read_json(folder / CHECKSUM, WEIGHTS)[WEIGHTS] == download.sha256_of(folder / WEIGHTS)
    except (OSError, PeftJaxError):
        return False


def read_config(path: Path) -> dict[str, Any]:
    """The Hugging Face config dict of a ``.gguf`` file, without its weights. Raises ``PeftJaxError`` as ``convert``."""
    folder = _cached(path)
    if folder.is_dir():
        return model_config.read(folder)
    reader = opened(path)
    return _config(reader, metadata(reader), path)


def _cached(path: Path) -> Path:
    stat = path.resolve().stat()  # the time of change cannot be set back, that of modification can
    key = f"{_VERSION} {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    return download.cache_folder("converted") / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def opened(path: Path):
    """The ``gguf`` package's reader of a file."""
    gguf = needed("gguf", f"to read {path}")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise PeftJaxError(f"{path} cannot be read as a GGUF file (damaged, or another format): {error}") from error


def _convert_into(folder: Path, path: Path) -> None:
    from safetensors.numpy import save_file

    from peft_jax.hub.formats.gguf_tokenizer import save_tokenizer

    reader = opened(path)
    fields = metadata(reader)
    config = _config(reader, fields, path)
    files.sweep(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        aside = Path(scratch, "whole")
        aside.mkdir()
        save_tokenizer(fields, aside, path)
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(_weights(reader, config, path), aside / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(aside / "config.json", aside / WEIGHTS)  # which safetensors makes private
        files.write(aside / CHECKSUM, json.dumps({WEIGHTS: download.sha256_of(aside / WEIGHTS)}))
        files.flush_all(aside)
        aside.rename(folder)


def metadata(reader) -> dict[str, Any]:
    """The key-value pairs of an open GGUF file; arrays as lists."""
    return {key: field.contents() for key, field in reader.fields.items()}


def _config(reader, fields: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = fields.get("general.architecture", "unknown")
    if kind != "llama" or fields.get("llama.expert_count"):
        raise PeftJaxError(f"{path} holds a model of architecture '{kind}'{' with experts' * (kind == 'llama')}: of "
                           "GGUF files only plain 'llama' ones are read; use the model's safetensors folder instead.")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head_dim = fields.get("llama.attention.key_length") or fields.get("llama.rope.dimension_count", width // heads)
    names = {tensor.name: tensor for tensor in reader.tensors}
    result = {
        "model_type": "llama",
        "vocab_size": int(names["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        # Stored as float32: the shortest decimal that reads back as the same float32 is the one that was meant.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "max_position_embeddings": fields["llama.context_length"],
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }
    result["rope_scaling"] = _rope_scaling(fields, names, result, path)
    return model_config.to_hf(model_config.from_hf(result), token_ids=_token_ids(fields))


def _token_ids(fields: dict[str, Any]) -> dict[str, int | None]:
    theirs = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {ours: fields.get(f"tokenizer.ggml.{key}") for ours, key in theirs.items()}


def _rope_scaling(fields: dict[str, Any], names: dict[str, Any], config: dict[str, Any], path: Path) -> dict | None:
    kind = fields.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": fields["llama.rope.scaling.factor"]}
    if kind != "none":
        raise PeftJaxError(f"{path} has rope scaling '{kind}', which is not read from GGUF files: use the model's "
                           "safetensors folder instead.")
    if "rope_freqs.weight" not in names:
        return None
    divisors = np.asarray(names["rope_freqs.weight"].data, np.float32)
    plain = rope.inverse_frequencies(config["head_dim"], config["rope_theta"], None)
    for scaling in _LLAMA3_SCALINGS:
        scaled = rope.inverse_frequencies(config["head_dim"], config["rope_theta"], scaling)
        if divisors.shape == plain.shape and np.allclose(plain / divisors, scaled, rtol=1e-4):
            return dict(scaling)
    raise PeftJaxError(f"{path} carries rope frequencies that are not those of Llama 3.1 or 3.2: use the model's "
                       "safetensors folder instead.")


def _weights(reader, config: dict[str, Any], path: Path) -> dict[str, np.ndarray]:
    """Hugging Face's tensors, float32."""
    from gguf.quants import dequantize

    weights = {}
    for tensor in reader.tensors:
        if tensor.name != "rope_freqs.weight":
            name, heads = hf_name(tensor.name, config, path)
            value = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            weights[name] = unpermute(value, heads) if heads else value
    return weights


def hf_name(name: str, config: dict[str, Any], path: Path) -> tuple[str, int]:
    """Hugging Face's name of a tensor, and of how many heads ggml has its rows in another order, 0 where it has not."""
    *block, kind_of, kind = name.split(".")
    if kind_of not in _TENSORS:
        raise PeftJaxError(f"{path} has a tensor '{name}' that a llama model does not have.")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    prefix = f"model.layers.{block[1]}." if len(block) == 2 else ""
    return f"{prefix}{_TENSORS[kind_of]}.{kind}", heads.get(kind_of, 0)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo ggml's order of the rows of a query or key projection (out, in) or bias (out,).

    ggml rotates neighbouring pairs (0, 1), (2, 3), ...; Hugging Face's layout rotates (0, H/2), (1, H/2 + 1), ...
    """
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)
