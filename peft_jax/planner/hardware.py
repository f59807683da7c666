"""GPUs and TPUs, and how many of which hold a step: counted up, and what the count leaves out said."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from peft_jax.errors import PeftJaxError


class Device(NamedTuple):
    """A device's memory in bytes, and how much of it no program of ours gets: the driver's context, the libraries'
    workspaces, what is lost between buffers. ``margin`` is an allowance, not a measurement."""

    name: str
    bytes: int
    margin: int = 2 * 10**9

    @property
    def room(self) -> int:
        return self.bytes - self.margin


# Memory of one device as its vendor states it, a GB taken as 1e9 bytes: a card sold as "80 GB" holds nearly 80 GiB, and
# who plans for 80e9 bytes is safe on both readings.
DEVICES = (
    Device("TPU v5e", 16 * 10**9),  # a chip; cloud.google.com/tpu/docs/v5e
    Device("RTX 4090", 24 * 10**9),  # nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4090
    Device("RTX 5090", 32 * 10**9),  # nvidia.com/en-us/geforce/graphics-cards/50-series/rtx-5090
    Device("TPU v6e", 32 * 10**9),  # a chip; cloud.google.com/tpu/docs/v6e
    Device("A100 40GB", 40 * 10**9),  # nvidia.com/en-us/data-center/a100
    Device("RTX A6000", 48 * 10**9),  # nvidia.com/en-us/design-visualization/rtx-a6000
    Device("L40S", 48 * 10**9),  # nvidia.com/en-us/data-center/l40s
    Device("A100 80GB", 80 * 10**9),  # nvidia.com/en-us/data-center/a100
    Device("H100 80GB", 80 * 10**9),  # nvidia.com/en-us/data-center/h100, SXM
    Device("TPU v5p", 95 * 10**9),  # a chip; cloud.google.com/tpu/docs/v5p
    Device("H200", 141 * 10**9),  # nvidia.com/en-us/data-center/h200
    Device("B200", 180 * 10**9),  # 8 are 1,440 GB: docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html
)


class Suggestion(NamedTuple):
    """So many of a device, 0 where no number of it is enough; ``share`` is what each would then hold, in bytes, and
    ``words`` what is left out of that."""

    device: Device
    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (a tuple's method, which nobody calls)
    share: int
    words: str


def suggest_hardware(need: Any, devices: Sequence[Device] = DEVICES) -> list[Suggestion]:
    """The least number of each device that holds ``need``, fewest first, then smallest.

    Args:
      need: bytes in all; or a :class:`peft_jax.planner.Plan`. A plan on a mesh says what each of its devices holds, and
        the suggestion is so many of those that hold it. Of one for one device weights, gradients and optimiser are
        divided evenly, activations and logits are not: each device has as many rows as the plan has.
      devices: to choose from.

    Bytes alone are divided evenly, which bounds the number from below: activations, what is gathered of a layer and
    small leaves lie on every device. Raises ``PeftJaxError`` for a need below 1 or without end.

    >>> [(one.device.name, one.count) for one in suggest_hardware(915 * 10**9)[:3]]
    [('B200', 6), ('H200', 7), ('TPU v5p', 10)]
    """
    if odd := [one for one in devices if not isinstance(one, Device)]:
        raise PeftJaxError(f"suggest_hardware: {odd[0]!r} is no Device: give some of peft_jax.planner.DEVICES.")
    cut, whole, exactly = _need(need)
    if cut + whole < 1:
        raise PeftJaxError(f"suggest_hardware: {need!r} bytes: give what is needed, at least 1, or a plan.")
    found = [_suggestion(device, cut, whole, exactly, isinstance(need, int | float)) for device in devices]
    return sorted(found, key=lambda one: (one.count or math.inf, one.device.bytes))


def _need(need: Any) -> tuple[int, int, int]:
    """(bytes that more devices share, bytes that each has, number of devices that it was planned for or 0)."""
    if not hasattr(need, "program"):
        if not isinstance(need, int | float) or isinstance(need, bool):
            raise PeftJaxError(f"suggest_hardware: a {type(need).__name__}: give bytes, or what peft_jax.plan "
                               "returned.")
        return math.ceil(need) if 0 < need < math.inf else 0, 0, 0
    total, devices = need.need, need.program.devices
    if devices > 1:
        return 0, total, devices
    states = min(total, sum(need.groups[name] for name in ("weights", "gradients", "optimiser")))
    return states, total - states, 0


def _suggestion(device: Device, cut: int, whole: int, exactly: int, bare: bool) -> Suggestion:
    left = device.room - whole
    if exactly:
        return Suggestion(device, exactly if left >= 0 else 0, whole, "as planned on the mesh" if left >= 0 else
                          "the plan's share is too large: cut weights over more (mesh.fsdp), or rows over more")
    if left < 0 or (left == 0 and cut):
        return Suggestion(device, 0, whole, "activations alone are too large: fewer or shorter rows, or remat")
    count = max(1, math.ceil(cut / left)) if cut else 1
    if count == 1:
        return Suggestion(device, 1, cut + whole, "one holds it")
    words = "at least: everything divided evenly" if bare else "weights and state divided evenly, activations not"
    return Suggestion(device, count, math.ceil(cut / count) + whole, f"{words}; traffic between them not counted")
