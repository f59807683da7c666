"""Bytes in use now and at most, of the device where it tells, else of this process."""

import contextlib
import resource
import sys
from pathlib import Path

import jax


def memory_now() -> int:
    """Bytes in use: on the device where it tells, else of this process on the host; 0 where neither does."""
    stats, host = jax.local_devices()[0].memory_stats(), Path("/proc/self/statm")
    if stats and "bytes_in_use" in stats:
        return stats["bytes_in_use"]
    return int(host.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if host.exists() else 0


def forget_peak() -> None:
    """Count the host's peak anew from here, where Linux lets us; a device's own count cannot be."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> dict[str, int]:
    """The most bytes used so far, or since :func:`forget_peak`, ``{"host": ..., "device": ...}``; "device" where there
    is one that tells."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = {"host": kilobytes if sys.platform == "darwin" else kilobytes * 1024}
    stats = jax.local_devices()[0].memory_stats()
    return peak | ({"device": stats["peak_bytes_in_use"]} if stats and "peak_bytes_in_use" in stats else {})
