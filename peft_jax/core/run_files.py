"""The JSON files that a run leaves in its workdir, read with the types that their readers rely on."""

from pathlib import Path
from typing import Any

from peft_jax.core.files import read_json
from peft_jax.core.json_shape import NUMBER

MEND = "remove it, or train again with --overwrite"  # what to do about a damaged one
METRICS = {str: NUMBER}
SHAPES = {
    "manifest.json": {"written": [str]},
    "fingerprint.json": {"examples": {"count": int, "sha256": str}, "base": {str: int}},
    "before.json": {"eval": dict, "metrics": METRICS},
    "results.json": {"before": METRICS, "after": METRICS, "trainable": int, "all": int, "seconds": NUMBER, "steps": int,
                     "peak_memory": {str: NUMBER}, "adapter": str, "adapter_bytes": int,
                     "training_memory": {str: NUMBER}},
    "measured.json": {"asked": dict, "test": METRICS, "general": {str: METRICS}, "neighbours": {str: METRICS},
                      "latency": {str: {"prefill": NUMBER, "token": NUMBER}}},
}
SECTIONS = ("model", "method", "task", "data", "optim")  # of config.json


def read(path: Path, *needed: str, mend: str = MEND) -> dict[str, Any]:
    """The object in a file of a run. Raises ``PeftJaxError``, which ends in ``mend``, where it is damaged, lacks a
    ``needed`` key, or is not of the types of ``SHAPES``; of a configuration the ``needed`` sections are objects."""
    shape = SHAPES.get(path.name, {name: dict for name in needed if name in SECTIONS})
    return read_json(path, *needed, shape=shape, mend=mend)
