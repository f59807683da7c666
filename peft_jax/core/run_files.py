"""The JSON files that a run leaves in its workdir, read with the types that their readers rely on."""

from pathlib import Path
from typing import Any

from peft_jax.core.files import read_json
from peft_jax.core.json_shape import NUMBER, misfit
from peft_jax.errors import PeftJaxError

MEND = "remove it, or train again with --overwrite"  # what to do about a damaged one
METRICS = {str: NUMBER}
SHAPES = {
    "config.json": {"model": dict, "method": dict, "task": dict, "data": dict, "optim": dict, "seed": int},
    "manifest.json": {"written": [str]},
    "fingerprint.json": {"examples": {"count": int, "sha256": str}, "base": {str: int}},
    "before.json": {"eval": dict, "metrics": METRICS},
    "results.json": {"before": METRICS, "after": METRICS, "trainable": int, "all": int, "seconds": NUMBER, "steps": int,
                     "peak_memory": {str: NUMBER}, "adapter": str, "adapter_bytes": int,
                     "training_memory": {str: NUMBER}},
    "measured.json": {"asked": dict, "test": METRICS, "general": {str: METRICS}, "neighbours": {str: METRICS},
                      "latency": {str: {"prefill": NUMBER, "token": NUMBER}}},
}


def read(path: Path, *needed: str, mend: str = MEND) -> dict[str, Any]:
    """The object in a file of a run. Raises ``PeftJaxError``, which ends in ``mend``, where it is damaged, lacks a
    ``needed`` key, or has one that is not of its type in ``SHAPES``."""
    value = read_json(path, *needed, mend=mend)
    if fault := misfit(value, {key: part for key, part in SHAPES.get(path.name, {}).items() if key in value}):
        raise PeftJaxError(f"{path} is damaged, {fault}: {mend}.")
    return value
