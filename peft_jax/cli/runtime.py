"""How jax runs, as the command line says: where compiled programs are kept, and several processes joined."""

import os

import jax

from peft_jax.errors import PeftJaxError
from peft_jax.hub import download

GRACE = 60  # seconds; jax's 300 would keep a process that met an error waiting for those that wait for it


def start(command) -> None:
    """Settle how jax runs, as the command line says, and join the other processes where there are some.

    Compiled programs are kept with the downloads, in ``PEFT_JAX_CACHE``, unless ``JAX_COMPILATION_CACHE_DIR`` says
    where. Raises ``PeftJaxError`` where other processes cannot be found.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(download.cache_folder("compiled")))
    jax.config.update("jax_debug_nans", command.debug_nans)
    if not command.distributed:
        return
    place = {"coordinator_address": command.coordinator, "num_processes": command.num_processes,
             "process_id": command.process_id}
    try:
        jax.distributed.initialize(**{name: value for name, value in place.items() if value is not None},
                                   shutdown_timeout_seconds=GRACE)
    except (ValueError, RuntimeError) as error:
        raise PeftJaxError(f"--distributed: {' '.join(str(error).split())[:200]}; under Slurm, on GKE and on TPU VMs "
                           "jax finds the other processes itself, elsewhere give --coordinator=HOST:PORT, "
                           "--num_processes and --process_id") from error
