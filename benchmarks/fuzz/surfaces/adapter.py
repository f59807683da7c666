"""An adapter's folder: its config and its weights; judged by the formula W + (alpha / r) B A in numpy, on what the
damaged files say."""

import json
import math
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.fuzz import damages, material
from benchmarks.fuzz.cases import Trial
from benchmarks.fuzz.surfaces import weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def prepare(place: Path) -> dict[str, Any]:
    from peft_jax.core import tree
    from peft_jax.hub.load import load_pretrained

    _, params = load_pretrained(material.model(place))
    return {"adapter": material.run(place) / "adapter", "model": material.model(place), "params": params,
            "paths": sorted(tree.flatten(params))}


def trial(base: dict[str, Any], rng: Random, folder: Path) -> Trial:
    shutil.copytree(base["adapter"], folder, dirs_exist_ok=True)
    harmless = False
    if rng.random() < 0.35:
        source = base["adapter"] / WEIGHTS
        (folder / WEIGHTS).unlink()
        what = f"{WEIGHTS}: {weights.damaged(source, folder / WEIGHTS, rng)}"
    else:
        what, harmless = _config(folder / CONFIG, rng)
    return Trial(what, lambda: merged(base, folder), _by_formula(base, folder), harmless)


def _config(file: Path, rng: Random) -> tuple[str, bool]:
    config, chance = json.loads(file.read_text()), rng.random()
    if chance < 0.1:
        return damages.kind_of(file, rng), False
    if chance < 0.25:
        what, content = damages.bytes_of(file.read_bytes(), rng)
        file.write_bytes(content)
        return f"{CONFIG}: {what}", False
    if chance < 0.35:
        file.write_bytes(damages.dumped(damages.shuffled({**config, "peft_version": "0.19"}, rng), rng))
        return f"{CONFIG}: other layout", True
    place = rng.choice([*damages.paths(config)])
    odd = rng.choice((*damages.ODD, "(a+)+$", "(.*)*(.*)*x", ["a" * 20] * 10000, {"(x+x+)+y": 4}, 8, 2.5))
    dropped = rng.random() < 0.2
    file.write_text(json.dumps(damages.drop(config, place) if dropped else damages.put(config, place, odd)))
    return f"{CONFIG}: {'.'.join(map(str, place))} {'is gone' if dropped else f'is {str(odd)[:40]!r}'}", False


def merged(base: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """The kernels that the adapter changes, as sums of them with weights that tell places apart."""
    from peft_jax.core import tree
    from peft_jax.hub.adapters.load import load_adapter

    method, params = load_adapter(folder, base["params"])
    before, after = tree.flatten(base["params"]), tree.flatten(method.merge(params))
    return {path: told(np.asarray(after[path])) for path in base["paths"]
            if not np.array_equal(np.asarray(before[path]), np.asarray(after[path]))}


def told(kernel: np.ndarray) -> list[float]:
    """Of a stack or a matrix: its sum, and its sum with other weights for each place."""
    wide = kernel.astype(np.float64)
    return [float(wide.sum()), float((wide.ravel() * np.sin(np.arange(wide.size))).sum())]


def _by_formula(base: dict[str, Any], folder: Path):
    def judge(result: dict[str, list[float]]) -> str:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
            expected = _expected(base, config, tensors)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError, OverflowError, ZeroDivisionError,
                AttributeError, re.error) as error:
            return f"it was accepted, and cannot be computed: {type(error).__name__}: {str(error)[:150]}"
        odd = [path for path in {**expected, **result} if not np.allclose(
            expected.get(path, [math.nan]), result.get(path, [math.nan]), rtol=1e-4, atol=1e-4,
            equal_nan=path in expected and path in result)]
        return f"{odd[0]} is {result.get(odd[0])}, by the formula {expected.get(odd[0])}" if odd else ""

    return judge


def _expected(base: dict[str, Any], config: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Ours of each stack of kernels, changed by the formula."""
    from peft_jax.core import tree

    changes: dict[str, dict[int, np.ndarray]] = {}
    for name in (name for name in tensors if ".lora_A." in name):
        module = name.removeprefix(PREFIX).partition(".lora_A.")[0]
        a, b = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        layer, kernel = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module).groups()
        changes.setdefault(kernel, {})[int(layer)] = _scale(config, module) * (b @ a).T
    flat, expected = tree.flatten(base["params"]), {}
    for kernel, layers in changes.items():
        path = next(path for path in base["paths"] if path.endswith(f"{kernel.replace('.', '/')}/kernel"))
        stack = np.array(flat[path], np.float64)
        for layer, delta in layers.items():
            stack[layer] += delta.reshape(stack[layer].shape)
        if any(delta.any() for delta in layers.values()):
            expected[path] = told(stack)
    return expected


def _scale(config: dict[str, Any], module: str) -> float:
    def pattern(name: str, default: Any) -> Any:
        return next((value for key, value in (config.get(name) or {}).items()
                     if re.fullmatch(rf"(.*\.)?({key})", module)), default)

    rank, alpha = pattern("rank_pattern", config.get("r", 8)), pattern("alpha_pattern", config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
