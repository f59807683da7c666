"""Bytes in use now and at most, of the device where it tells, else of this process; and bytes that are free."""

import contextlib
import re
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


def free_memory() -> int | None:
    """Bytes that are free: on the device where it tells, on a CPU of this host; ``None`` where nobody tells."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return _free_of_host() if device.platform == "cpu" else None


def _free_of_host() -> int | None:
    """What Linux says is available, or what a container has left of its limit, where that is less."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    kilobytes = {line.split()[0]: int(line.split()[1]) for line in table.read_text(encoding="ascii").splitlines()}
    free = kilobytes["MemAvailable:"] * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if not limit.exists() or (most := limit.read_text(encoding="ascii").strip()) == "max":
        return free
    return min(free, int(most) - int(used.read_text(encoding="ascii")))


def forget_peak() -> None:
    """Count the host's peak anew from here, where Linux lets us; a device's own count cannot be."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> dict[str, int]:
    """The most bytes used so far, or since :func:`forget_peak`, ``{"host": ..., "device": ...}``; "device" where there
    is one that tells."""
    peak = {"host": peak_of_host()}
    stats = jax.local_devices()[0].memory_stats()
    return peak | ({"device": stats["peak_bytes_in_use"]} if stats and "peak_bytes_in_use" in stats else {})


def peak_of_host() -> int:
    """The most bytes of this process in memory. Linux's ``ru_maxrss`` may be that of the process that started it."""
    status = Path("/proc/self/status")
    text = status.read_text(encoding="ascii", errors="replace") if status.exists() else ""
    if told := re.search(r"VmHWM:\s+(\d+) kB", text):
        return int(told[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
