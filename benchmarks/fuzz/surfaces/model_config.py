"""config.json of a model; judged by transformers' reading of the same file, or by its plain JSON where that refuses."""

import dataclasses
import json
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import damages
from benchmarks.fuzz.cases import Trial, differences, equal, never, same

SIZES = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
           "hidden_act": "silu", "tie_word_embeddings": True}
FAMILIES = {
    "llama": {"model_type": "llama", **DECODER, "attention_bias": False, "mlp_bias": False, "rope_scaling": LLAMA3},
    "mistral": {"model_type": "mistral", **DECODER, "sliding_window": 32},
    "qwen2": {"model_type": "qwen2", **DECODER, "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", **DECODER, "attention_bias": False},
    "gpt2": {"model_type": "gpt2", "vocab_size": 320, "n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 4,
             "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    "bert": {"model_type": "bert", **SIZES, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    "roberta": {"model_type": "roberta", **SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu"},
}  # fmt: skip


def prepare(place: Path) -> None:
    """Nothing is needed but that all is imported."""
    from peft_jax.hub import load  # noqa: F401

    for family in FAMILIES.values():
        theirs_of(family)


def trial(base: Any, rng: Random, folder: Path) -> Trial:
    config = FAMILIES[family := rng.choice(list(FAMILIES))]
    plain, file, chance = fields_of(folder, config), folder / "config.json", rng.random()
    if chance < 0.1:
        file.unlink()
        return Trial(f"{family}: {damages.kind_of(file, rng)}", lambda: fields(folder), never)
    if chance < 0.25:
        more = {rng.choice(("my_note", "transformers_version", "_name_or_path")): rng.choice(("x", 1, None, [1]))}
        file.write_bytes(damages.dumped(damages.shuffled({**config, **more}, rng), rng))
        return Trial(f"{family}: other layout, {more}", lambda: fields(folder), equal(plain), harmless=True)
    if chance < 0.45:
        what, content = damages.bytes_of(damages.dumped(config, rng), rng)
        file.write_bytes(content)
        return Trial(f"{family}: {what}", lambda: fields(folder), as_written(content, config, plain))
    place = rng.choice(list(damages.paths(config)))
    dropped, odd = rng.random() < 0.3, rng.choice(damages.ODD)
    content = json.dumps(damages.drop(config, place) if dropped else damages.put(config, place, odd)).encode()
    file.write_bytes(content)
    what = "is gone" if dropped else f"is {str(odd)[:40]!r}"
    return Trial(f"{family}: {'.'.join(place)} {what}", lambda: fields(folder), as_written(content, config, plain))


def fields_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    return fields(folder)


def fields(folder: Path) -> dict[str, Any]:
    """What the library makes of a config.json."""
    from peft_jax.hub.load import load_config

    config = load_config(folder)
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def as_written(content: bytes, whole: dict[str, Any], plain: dict[str, Any]):
    """A judge: what transformers reads as of the ``whole`` config is as it is in ``plain``, which we made of that; what
    it reads otherwise is as it reads it, or as it is written."""

    def judge(result: dict[str, Any]) -> str:
        try:
            theirs, before = theirs_of(json.loads(content)), theirs_of(whole)
        except (ValueError, RecursionError, AttributeError) as error:
            return f"it was accepted, and is no JSON object: {error}"
        expected = {name: plain[name] if same(theirs[name], before.get(name)) else theirs[name]
                    for name in result if name in theirs and not isinstance(result[name], dict)}
        ours = {name: result[name] for name in expected}
        return "" if same(ours, expected) or _close(ours, expected) else differences(expected, ours)

    return judge


def theirs_of(written: dict[str, Any]) -> dict[str, Any]:
    """The same fields as transformers reads them; where it refuses, as they stand in the file."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[written["model_type"]].from_dict(dict(written))
    except Exception:  # whatever its own checks raise
        return written
    names = {name for family in FAMILIES.values() for name in family} - {"model_type", "rope_scaling", "rope_theta"}
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] or (isinstance(other[name], list) and list(one[name] or ()) == other[name])
               for name in one)
