"""Several processes, one run: each has some of the devices, all of them run the same program, the first one writes.

The runtime is jax's own, ``jax.distributed``. The workdir is one that all processes see.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.parallel.mesh import fetch


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """While entered, what processes but the first print goes nowhere; errors are still told by all of them."""
    if first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def agreed(value: bool) -> bool:
    """The first process's ``value``: for what depends on files, which another may see sooner or later."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def check_alike(settings: Mapping[str, Any]) -> None:
    """Raise ``PeftJaxError``, in all processes, where their ``settings``, of values that JSON has, are not the same."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = [zlib.crc32(json.dumps(value, sort_keys=True).encode()) for value in settings.values()]
    everyone = multihost_utils.process_allgather(np.array(digests, np.uint32))
    if odd := [name for name, column in zip(settings, everyone.T, strict=True) if len(set(column.tolist())) > 1]:
        raise PeftJaxError(f"the processes differ in {', '.join(odd)}: start all of them with the same command, but "
                           "for --process_id.")


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def preempted(step: int) -> bool:
    """Whether the cluster has sent some process a SIGTERM, and all have come to the step to stop at."""
    if jax.process_count() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def brought(params: tree.Tree, wanted: Callable[[str], bool]) -> tree.Tree:
    """``params`` with the leaves of ``wanted`` paths whole on the first process, one after another, and of all others
    the shapes alone; other processes keep nothing."""
    if jax.process_count() == 1:
        return params

    def bring(path: str, leaf: Any) -> Any:
        if not wanted(path):
            return jax.eval_shape(lambda leaf: leaf, leaf)
        whole = jax.tree.map(fetch, leaf)
        return whole if first() else jax.eval_shape(lambda leaf: leaf, whole)

    return tree.map_paths(bring, params)
