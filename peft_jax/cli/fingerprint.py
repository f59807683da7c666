"""What a run began with (``fingerprint.json``), so that it is not resumed on other data or another base."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.cli import workdir
from peft_jax.core import tree
from peft_jax.core.checksums import checksums
from peft_jax.errors import PeftJaxError
from peft_jax.parallel import processes
from peft_jax.parallel.mesh import fetch

FILE = "fingerprint.json"


def settle(folder: Path, examples: Sequence[Any], base: tree.Tree) -> None:
    """Write the fingerprint of a run that begins, and compare it where the run goes on.

    Args:
      examples: the training examples as they are learnt, a NamedTuple of arrays and numbers each.
      base: the parameters before the method's.
    Raises:
      PeftJaxError: in all processes, where the run in ``folder`` began with others; says which.
    """
    now = {"examples": {"count": len(examples), "sha256": _digest(examples)}, "base": _sums(base)}
    path = folder / FILE
    changed = _changed(workdir.read_json(path, *now), now) if processes.first() and path.exists() else ""
    if processes.agreed(bool(changed)):
        raise PeftJaxError(f"{folder} holds a run that began with other {changed or 'data or weights'}: bring them "
                           "back to go on, choose another --workdir, or --overwrite to train again from the start")
    if processes.first() and not path.exists():
        workdir.write_json(path, now)


def _digest(examples: Sequence[Any]) -> str:
    """sha256 of all fields of all examples, in their order."""
    digest = hashlib.sha256()
    for field in (np.asarray(field) for example in examples for field in example):
        digest.update(f"{field.dtype.str}{field.shape}".encode() + field.tobytes())
    return digest.hexdigest()


def _sums(base: tree.Tree) -> dict[str, int]:
    return {path: int(fetch(value)) for path, value in checksums(base).items()}


def _changed(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What has changed, in words; "" if nothing."""
    if then["examples"] != now["examples"]:
        return f"training examples ({then['examples'].get('count')} then, {now['examples']['count']} now)"
    odd = [path for path, value in now["base"].items() if then["base"].get(path) != value]
    return f"base weights ({odd[0]}{f' and {len(odd) - 1} more' if odd[1:] else ''} changed)" if odd else ""
