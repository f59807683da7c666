"""Read a ``.gguf`` file (llama.cpp's format) of the Llama architecture.

The file is converted once into an ordinary Hugging Face folder in the cache (config.json, float32 safetensors,
tokenizer files), four bytes a parameter, which everything else then reads. Format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.core import files
from peft_jax.errors import PeftJaxError
from peft_jax.hub import download, expected_tensors, families, model_config
from peft_jax.hub.families import hf_names
from peft_jax.hub.families.family import table_of
from peft_jax.hub.formats import gguf_config, gguf_header

# Raise this when the conversion changes, so that old results in people's caches are not used.
_VERSION = 3
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

_NAME = re.compile(r"(blk\.(?P<layer>0|[1-9]\d{0,4})\.)?(?P<kind_of>\w+)\.(?P<leaf>weight|bias)", re.ASCII)


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
    files.regular_file(path, "a model")
    folder = _cached(path)
    return model_config.read(folder) if folder.is_dir() else gguf_config.config_of(gguf_header.read(path), path)


def _cached(path: Path) -> Path:
    stat = path.resolve().stat()  # the time of change cannot be set back, that of modification can
    key = f"{_VERSION} {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    return download.cache_folder("converted") / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _convert_into(folder: Path, path: Path) -> None:
    from safetensors.numpy import save_file

    from peft_jax.hub.formats.gguf_tokenizer import save_tokenizer

    header = gguf_header.read(path)
    config = gguf_config.config_of(header, path)
    named = {hf_name(name, config, path)[0]: info for name, info in header.tensors.items()
             if name != gguf_config.FREQUENCIES}
    _check_fits(named, config, path)
    files.sweep(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        aside = Path(scratch, "whole")
        aside.mkdir()
        save_tokenizer(header.fields, config["vocab_size"], aside, path)
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file({name: _values(info, config) for name, info in named.items()}, aside / WEIGHTS,
                  metadata={"format": "pt"})
        shutil.copymode(aside / "config.json", aside / WEIGHTS)  # which safetensors makes private
        files.write(aside / CHECKSUM, json.dumps({WEIGHTS: download.sha256_of(aside / WEIGHTS)}))
        files.flush_all(aside)
        aside.rename(folder)


def _values(info: gguf_header.Info, config: dict[str, Any]) -> np.ndarray:
    heads = hf_name(info.name, config, info.file)[1]
    return unpermute(info.floats(), heads) if heads else info.floats()


def _check_fits(named: dict[str, gguf_header.Info], config: dict[str, Any], path: Path) -> None:
    """Raise ``PeftJaxError`` where the tensors are not those of the model that the metadata describe."""
    model = model_config.from_hf(config)
    shapes = model_config.param_shapes(model)
    places = hf_names.tensors(table_of(families.of(model), shapes), shapes, model.num_hidden_layers)
    expected_tensors.check(path, dict(named), places, shapes, model)


def hf_name(name: str, config: dict[str, Any], path: Path) -> tuple[str, int]:
    """Hugging Face's name of a tensor, and of how many heads ggml has its rows in another order, 0 where it has not."""
    found = _NAME.fullmatch(name)
    if not found or found["kind_of"] not in _TENSORS:
        raise PeftJaxError(f"{path} has a tensor '{name:.60}' that a llama model does not have.")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    prefix = f"model.layers.{found['layer']}." if found["layer"] else ""
    return f"{prefix}{_TENSORS[found['kind_of']]}.{found['leaf']}", heads.get(found["kind_of"], 0)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo ggml's order of the rows of a query or key projection (out, in) or bias (out,).

    ggml rotates neighbouring pairs (0, 1), (2, 3), ...; Hugging Face's layout rotates (0, H/2), (1, H/2 + 1), ...
    """
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)
