"""How jax runs, as the command line says: where compiled programs are kept, and several processes joined."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import jax

from peft_jax.core import files
from peft_jax.errors import PeftJaxError
from peft_jax.hub import download

GRACE = 60  # seconds; jax's 300 would keep a process that met an error waiting for those that wait for it
MOST_COMPILED = 4 << 30  # bytes: a few hundred training steps of large models
NO_DEVICE = ("plan", "recommend", "show")  # modes that compute nothing, or from shapes alone
PLUGIN = re.compile(r"(jax[-_](cuda|rocm)\w*[-_]plugin|libtpu)$")  # distributions that bring jax to an accelerator
CARDS = {"an NVIDIA card": "/dev/nvidia0", "an AMD card": "/dev/kfd", "a TPU": "/dev/accel0"}  # and where each shows


def start(command) -> None:
    """Settle how jax runs, as the command line says, and join the other processes where there are some.

    Compiled programs are kept with the downloads, in ``PEFT_JAX_CACHE``, unless ``JAX_COMPILATION_CACHE_DIR`` says
    where; those that were not used for longest go when there are more than ``MOST_COMPILED`` bytes of them. Prints one
    line where an accelerator is at hand and jax computes on the CPU. Raises ``PeftJaxError`` where other processes
    cannot be found.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(_programs()))
        if not os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE"):
            jax.config.update("jax_compilation_cache_max_size", MOST_COMPILED)
    jax.config.update("jax_debug_nans", command.debug_nans)
    if command.distributed:
        _join(command)
    asked = jax.config.jax_platforms  # pyright: ignore
    if command.mode not in NO_DEVICE and not asked and jax.default_backend() == "cpu":
        cards = [name for name, device in CARDS.items() if Path(device).exists()]
        if note := unused_accelerator(plugins(), cards):
            print(note, flush=True)


@contextlib.contextmanager
def quiet_writers() -> Iterator[None]:
    """While entered, the threads that write checkpoints print no traceback of an error that is raised as well, nor of
    what they find closed when they come after it. After an error they stay quiet, as they may still be at it."""
    usual, loggers = sys.unraisablehook, {name: logging.getLogger(name) for name in ("absl", "asyncio")}
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda told: None if str(told.exc_value) == "Event loop is closed" else usual(told)
    yield
    sys.unraisablehook = usual
    for name, logger in loggers.items():
        logger.setLevel(levels[name])


def _programs() -> Path:
    """Where compiled programs are kept. Of each jax notes when it was last used; one without that, which a killed
    process left, would keep it from writing any other."""
    folder = download.cache_folder("programs")
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)
    files.remove(folder.with_name("compiled"))  # of versions whose programs had no such notes
    return folder


def plugins() -> dict[str, str]:
    """{name: version} of the installed distributions that bring jax to an accelerator."""
    names = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    return {name: version for name, version in names.items() if name and PLUGIN.match(name)}


def unused_accelerator(versions: Mapping[str, str], cards: list[str]) -> str | None:
    """What to tell a person whose jax computes on the CPU, beside these plugins ({name: version}) and ``cards``.

    >>> print(unused_accelerator({"jax-cuda13-plugin": "0.1.0"}, []))  # doctest: +ELLIPSIS
    computing on the CPU, although jax-cuda13-plugin 0.1.0 is installed: it must be of jax's version, ...
    """
    if versions:
        names = ", ".join(f"{name} {version}" for name, version in versions.items())
        other = not set(versions.values()) & {jax.__version__} and "libtpu" not in versions
        why = (f"it must be of jax's version, {jax.__version__}" if other else
               "jax cannot use it here; python -c 'import jax; jax.devices(\"gpu\")' says why")
        return f"computing on the CPU, although {names} is installed: {why} (JAX_PLATFORMS=cpu: without this line)"
    if cards:
        return (f"computing on the CPU, although this machine has {cards[0]}: jax's plugin for it is not installed; "
                "pip install 'jax[cuda13]', or cuda12, or tpu, brings it (JAX_PLATFORMS=cpu: without this line)")
    return None


def _join(command) -> None:
    place = {"coordinator_address": command.coordinator, "num_processes": command.num_processes,
             "process_id": command.process_id}
    try:
        jax.distributed.initialize(**{name: value for name, value in place.items() if value is not None},
                                   shutdown_timeout_seconds=GRACE)
    except (ValueError, RuntimeError) as error:
        raise PeftJaxError(f"--distributed: {' '.join(str(error).split())[:200]}; under Slurm, on GKE and on TPU VMs "
                           "jax finds the other processes itself, elsewhere give --coordinator=HOST:PORT, "
                           "--num_processes and --process_id") from error
