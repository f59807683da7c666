"""A .gguf file: its metadata, its list of tensors, its bytes; judged by the ``gguf`` package's reading of the same."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.fuzz import damages, material
from benchmarks.fuzz.cases import Trial
from benchmarks.fuzz.surfaces.weights import sums

D, F, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2
BLOCK = {"attn_norm": (D,), "attn_q": (D, D), "attn_k": (16, D), "attn_v": (16, D), "attn_output": (D, D),
         "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
SIZES = {"llama.block_count": LAYERS, "llama.context_length": 64, "llama.embedding_length": D,
         "llama.feed_forward_length": F, "llama.attention.head_count": HEADS,
         "llama.attention.head_count_kv": KV_HEADS, "llama.rope.dimension_count": D // HEADS}
FIELDS = {"llama.block_count": "num_hidden_layers", "llama.context_length": "max_position_embeddings",
          "llama.embedding_length": "hidden_size", "llama.feed_forward_length": "intermediate_size",
          "llama.attention.head_count": "num_attention_heads", "llama.rope.freq_base": "rope_theta",
          "llama.attention.head_count_kv": "num_key_value_heads",
          "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps"}
WORDS = ("", "a", "llama", "gpt2", "smollm", "x" * 300, "\0", "mamba")


def prepare(place: Path) -> dict[str, Any]:
    """The keys and the tensors of a whole file."""
    import json

    backend = json.loads(material.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    types = [3 if token in ("<end>", "<user>", "<answer>") else 1 for token in tokens]
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), D), "output_norm": (D,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in BLOCK.items()}
    keys = {**SIZES, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in backend["merges"]],
            "tokenizer.ggml.padding_token_id": 0, "tokenizer.chat_template": material.TEMPLATE}
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {"keys": keys, "tensors": tensors}


def trial(base: dict[str, Any], rng: Random, folder: Path) -> Trial:
    keys, tensors, file, arch = dict(base["keys"]), dict(base["tensors"]), folder / "tiny.gguf", "llama"
    kind = rng.choice(("key", "key", "key", "tensor", "tensor", "bytes", "bytes", "header", "file"))
    what = "as it was"
    if kind == "key":
        what = _key(keys, rng)
    elif kind == "tensor":
        what = _tensor(tensors, rng)
    write(file, arch, keys, tensors, rng.choice(("F32", "Q8_0", "Q4_0")))
    if kind == "file":
        what = damages.kind_of(file, rng)
    if kind in ("bytes", "header"):
        content = file.read_bytes()
        start = rng.randrange(min(20_000, len(content))) if kind == "header" else 0
        what, changed = damages.bytes_of(content[start:start + 64] if kind == "header" else content, rng)
        file.write_bytes(content[:start] + changed[:64] + content[start + 64:] if kind == "header" else changed)
        what = f"{what}, at byte {start}"
    return Trial(f"{kind}: {what}", lambda: ours(file), as_theirs(file))


def _key(keys: dict[str, Any], rng: Random) -> str:
    key = rng.choice(list(keys))
    if rng.random() < 0.4:
        del keys[key]
        return f"{key} is gone"
    old = keys[key]
    odd = rng.choice((0, 1, 3, 7, -1, 2**31, 10**9, 0.5, float("nan"), -1.0, float("inf"), True, *WORDS, ["a"], [1, 2]))
    if isinstance(old, list) and rng.random() < 0.6:
        odd = rng.choice((old[:-1], old[:3], old + old, [old[0]] * len(old), list(reversed(old))))
    keys[key] = odd
    return f"{key} is {str(odd)[:40]!r}"


def _tensor(tensors: dict[str, np.ndarray], rng: Random) -> str:
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    change = rng.choice(("gone", "renamed", "shape", "NaN", "more", "layer"))
    other = rng.choice(("blk.0.attn_q.bias", "blk.99.attn_q.weight", "blk.x.attn_q.weight", "blk.attn_q.weight", "",
                        "a.b.c.d", "weight", "blk.-1.ffn_up.weight", "output.weight", "x" * 60, "token_embd.bias"))
    if change == "shape":
        tensors[name] = tensor.T if tensor.ndim == 2 and rng.random() < 0.5 else np.concatenate([tensor, tensor])
    elif change == "NaN":
        tensors[name] = np.full_like(tensor, np.nan)
    elif change != "gone":
        tensors |= {other: tensor, **({} if change == "renamed" else {name: tensor})}
    return f"{name}: {change} {other if change in ('renamed', 'more', 'layer') else ''}"


def write(file: Path, arch: str, keys: dict[str, Any], tensors: dict[str, np.ndarray], kind: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, arch)
    for key, value in keys.items():
        _add(writer, key, value)
    for name, value in tensors.items():
        if value.ndim == 2 and kind != "F32" and value.shape[1] % 32 == 0 and np.isfinite(value).all():
            code = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(value, code), raw_dtype=code)
        else:
            writer.add_tensor(name, value)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 2**32 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        (writer.add_array if isinstance(value, list) else writer.add_string)(key, value)


def ours(file: Path) -> dict[str, Any]:
    """Config, tokens and numbers as the library reads them."""
    from peft_jax.core import tree
    from peft_jax.hub.load import load_pretrained
    from peft_jax.hub.tokenizer import load_tokenizer

    model, params = load_pretrained(file)
    tokenizer = load_tokenizer(file)
    config = {ours: getattr(model.config, ours) for ours in FIELDS.values()}
    return {"config": config, "sums": sums([np.asarray(leaf) for leaf in tree.flatten(params).values()]),
            "eos": tokenizer.eos_token_id, "ids": tokenizer("a dull film")["input_ids"],
            "tokens": tokenizer.convert_ids_to_tokens(range(min(8, len(tokenizer))))}


def as_theirs(file: Path):
    def judge(result: dict[str, Any]) -> str:
        import gguf

        try:
            reader = gguf.GGUFReader(file)
            fields = {key: field.contents() for key, field in reader.fields.items()}
            numbers = sums([np.asarray(gguf.quants.dequantize(one.data, one.tensor_type), np.float32)
                            for one in reader.tensors])
        except Exception as error:  # their reader raises what numpy does
            return f"it was accepted, and the gguf package cannot read it: {type(error).__name__}: {error}"
        odd = [key for key, ours in FIELDS.items() if key in fields and not _alike(fields[key], result["config"][ours])]
        if odd:
            return f"{odd[0]} is {fields[odd[0]]}, read as {result['config'][FIELDS[odd[0]]]}"
        if not np.isfinite(result["sums"]).all() or not np.allclose(result["sums"], numbers, rtol=1e-6):
            return f"sums {result['sums']}, of the file {numbers}"
        if result["eos"] != fields.get("tokenizer.ggml.eos_token_id", result["eos"]):
            return f"eos is {fields['tokenizer.ggml.eos_token_id']}, read as {result['eos']}"
        tokens = fields.get("tokenizer.ggml.tokens", [])[:len(result["tokens"])]
        return "" if tokens == result["tokens"] else f"tokens {tokens}, read as {result['tokens']}"

    return judge


def _alike(written: Any, read: Any) -> bool:
    return isinstance(written, int | float) and bool(np.isclose(float(written), float(read), rtol=1e-6))
