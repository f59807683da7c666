"""The workdir of a run, one of its files damaged, and every mode on it; judged by what the undamaged one gives."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import damages, material
from benchmarks.fuzz.cases import Trial, equal

MODES = {  # the files that a mode reads; others may hold anything
    "train": ("results.json", "config.json", "manifest.json", "lock", "lock.json"),
    "resume": ("config.json", "manifest.json", "fingerprint.json", "before.json", "metrics.jsonl", "checkpoints",
               "lock", "lock.json", "results.json", "checkpoint file"),
    "eval": ("config.json", "manifest.json", "adapter", "adapter/adapter_config.json",
             "adapter/adapter_model.safetensors", "eval.json"),
    "generate": ("config.json", "manifest.json", "adapter", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors"),
    "merge": ("config.json", "manifest.json", "adapter", "adapter/adapter_model.safetensors", "merged"),
    "measure": ("measured.json", "manifest.json", "config.json"),
    "show": ("config.json", "results.json"),
    "plan": ("manifest.json", "plan.json"),
}  # fmt: skip


def prepare(place: Path) -> dict[str, Any]:
    """The finished workdir, the same as it was at its middle step, and what each mode says of it."""
    finished, folder = material.run(place), place / f"base-run-{os.getpid()}"
    stopped = material.once(place, "stopped", lambda aside: _stop(finished, aside))
    base: dict[str, Any] = {"place": place, "finished": finished, "stopped": stopped}
    gives = material.once(place, "gives", lambda aside: (aside / "gives.json").write_text(json.dumps(
        {mode: _whole(base, mode, folder) for mode in MODES})) and None)
    _whole(base, "eval", folder)  # so that all is imported
    return {**base, "gives": json.loads((gives / "gives.json").read_text())}


def _whole(base: dict[str, Any], mode: str, folder: Path) -> dict[str, Any]:
    _copied(base, mode, folder)
    try:
        return given(base, mode, folder)
    finally:
        shutil.rmtree(folder)


def _stop(finished: Path, folder: Path) -> None:
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    for name in ("results.json", "eval.json", "measured.json"):
        (folder / name).unlink()
    for name in ("adapter", "merged", "checkpoints/4"):
        shutil.rmtree(folder / name)


def _copied(base: dict[str, Any], mode: str, folder: Path) -> None:
    shutil.copytree(base["stopped" if mode == "resume" else "finished"], folder, dirs_exist_ok=True)


def trial(base: dict[str, Any], rng: Random, folder: Path) -> Trial:
    mode = rng.choice([mode for mode, names in MODES.items() for _ in names])
    folder = folder / "run"
    _copied(base, mode, folder)
    name = rng.choice(MODES[mode])
    if name == "checkpoint file":
        name = str(rng.choice(sorted(path for path in (folder / "checkpoints").rglob("*") if path.is_file()))
                   .relative_to(folder))
    what = damaged(folder / name, rng)
    return Trial(f"--mode={mode}, {name}: {what}", lambda: given(base, mode, folder), equal(base["gives"][mode]))


def damaged(path: Path, rng: Random) -> str:
    if path.is_dir() or not path.exists() or rng.random() < 0.3:
        return damages.kind_of(path, rng)
    if path.suffix == ".json" and rng.random() < 0.6:
        value = json.loads(path.read_text())
        place, odd = rng.choice(list(damages.paths(value))), rng.choice(damages.ODD)
        dropped = rng.random() < 0.3
        path.write_text(json.dumps(damages.drop(value, place) if dropped else damages.put(value, place, odd)))
        return f"{'.'.join(map(str, place))} {'is gone' if dropped else f'is {str(odd)[:40]!r}'}"
    what, content = damages.bytes_of(path.read_bytes(), rng)
    path.write_bytes(content)
    return what


def given(base: dict[str, Any], mode: str, folder: Path) -> dict[str, Any]:
    """What a mode prints, without times and places, and, of one that trains or merges, what it leaves."""
    argv = [*material.arguments(base["place"]), f"--workdir={folder}",
            f"--mode={'train' if mode == 'resume' else mode}"]
    said = material.command(argv)
    said = said if mode in ("eval", "generate", "show") else ""
    left = {"merge": ["merged/model.safetensors"], "resume": ["adapter/adapter_model.safetensors"]}.get(mode, [])
    return {"said": re.sub(r"\S*/\S*|\d+ s\b", "", said), **{name: _hash(folder / name) for name in left}}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
