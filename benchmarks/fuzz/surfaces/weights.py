"""Weights in a safetensors file; judged by the safetensors package: the same numbers come of the same file."""

import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.fuzz import damages, material
from benchmarks.fuzz.cases import Trial

NAME = "model.safetensors"


def prepare(place: Path) -> Path:
    return material.model(place)


def trial(base: Path, rng: Random, folder: Path) -> Trial:
    shutil.copy(base / "config.json", folder)
    what = damaged(base / NAME, folder / NAME, rng)
    return Trial(what, lambda: ours(folder), sums_as_in(folder / NAME))


def damaged(source: Path, file: Path, rng: Random) -> str:
    """Write a damaged copy of a safetensors file; says what was done."""
    chance = rng.random()
    if chance < 0.1:
        return damages.kind_of(file, rng)
    if chance < 0.4:
        what, content = damages.bytes_of(source.read_bytes(), rng)
        file.write_bytes(content)
        return what
    if chance < 0.6:
        return _odd_number(source, file, rng)
    header, data = split(source.read_bytes())
    place, odd = rng.choice(list(damages.paths(header))), rng.choice(damages.ODD)
    dropped = rng.random() < 0.3
    header = damages.drop(header, place) if dropped else damages.put(header, place, odd)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", rng.choice((len(text),) * 8 + (0, 2**63, len(text) + 1))) + text + data)
    return f"header: {'.'.join(map(str, place))} {'is gone' if dropped else f'is {str(odd)[:40]!r}'}"


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:8 + size]), content[8 + size:]


def _odd_number(source: Path, file: Path, rng: Random) -> str:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source)
    name = rng.choice(sorted(tensors))
    tensor, number = tensors[name].copy(), rng.choice((np.nan, np.inf, 1e38, 0.25, -3.0))
    tensor.flat[rng.randrange(tensor.size)] = number
    kind = rng.choice(("number", "shape", "type", "name", "more"))
    changes = {"number": {name: tensor}, "shape": {name: tensor.reshape(-1)}, "more": {"more": tensor},
               "type": {name: tensor.astype(rng.choice((np.int32, np.float16, np.float64)))},
               "name": {name + "x": tensor}}[kind]
    kept = {key: one for key, one in tensors.items() if kind != "name" or key != name}
    with np.errstate(all="ignore"):
        save_file({**kept, **changes}, file, metadata={"format": "pt"})
    return f"{name} has another {kind}, and a {number}"


def ours(folder: Path) -> list[float]:
    from peft_jax.core import tree
    from peft_jax.hub.load import load_pretrained

    _, params = load_pretrained(folder)
    return sums([np.asarray(leaf) for leaf in tree.flatten(params).values()])


def sums(tensors: list[np.ndarray]) -> list[float]:
    """Numbers that hardly stay where one value changes: how many, their sum, and that of their squares."""
    wide = [tensor.astype(np.float64) for tensor in tensors]
    return [float(sum(one.size for one in wide)), float(sum(one.sum() for one in wide)),
            float(sum((one * one).sum() for one in wide))]


def sums_as_in(file: Path):
    def judge(result: list[float]) -> str:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = list(load_file(file).values())
        except (SafetensorError, OSError, ValueError) as error:
            return f"it was accepted, and safetensors refuses it: {error}"
        expected = sums([tensor.astype(np.float32) for tensor in tensors])
        if not np.isfinite(result).all():
            return "weights that are not finite"
        return "" if np.allclose(result, expected, rtol=1e-9) else f"sums {result}, of the file {expected}"

    return judge
