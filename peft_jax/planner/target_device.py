"""A device that need not be there: with jax's CUDA plugin programs compile for an H100 on any machine, with libtpu for
a chip of a TPU."""

from typing import Any, NamedTuple

import jax
from jax.experimental import topologies


class Target(NamedTuple):
    """name, for people. sharding: where arguments lie, ``None`` for the default device. options: for the compiler."""

    name: str
    sharding: Any
    options: dict[str, Any]

    @property
    def device(self) -> Any:
        """The one it is, ``None`` for the default."""
        return next(iter(self.sharding.device_set)) if self.sharding else None

    def place(self, shapes: Any) -> Any:
        """``shapes`` with leaves that lie on the target."""
        if self.sharding is None:
            return shapes
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding), shapes)


# What XLA asks of a GPU, for the SXM card (NVIDIA H100 Tensor Core GPU Architecture, table 3, and the CUDA programming
# guide's table for compute capability 9.0).
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100() -> Target | None:
    """One H100 of 80 GB as a target, ``None`` where jax's CUDA plugin is not installed or does not load.

    On a machine without a GPU the plugin loads with ``JAX_PLATFORMS=cpu`` in the environment. Kernels are not tuned by
    trying them out, for want of the card.
    """
    try:
        found = topologies.get_topology_desc("", "cuda", target_config=_H100, topology="1x1x1")
    except (NotImplementedError, RuntimeError):  # no such platform, or one that does not start
        return None
    place = jax.sharding.SingleDeviceSharding(found.devices[0])
    return Target(f"{found.devices[0].device_kind}, without one", place, {"xla_gpu_autotune_level": "0"})


def tpu(topology: str = "v5p:2x2x1") -> Target | None:
    """One chip of a TPU as a target, ``None`` where libtpu is not installed or does not load.

    ``topology``: a kind and the chips of a host, such as "v5e:2x2" or "v6e:2x2". On a machine without a TPU libtpu
    loads with ``JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1`` in the environment; the second says that there is no server to
    ask about the TPU.
    """
    try:
        found = topologies.get_topology_desc(topology, "tpu")
    except (NotImplementedError, RuntimeError):
        return None
    kind, place = found.devices[0].device_kind, jax.sharding.SingleDeviceSharding(found.devices[0])
    return Target(f"{kind}, without one", place, {})
