"""A plan: the compiled program beside the sum of parts, and whether a device holds it; as a table and as JSON."""

from typing import Any, NamedTuple

from peft_jax.planner.parts import GROUPS, Part, groups, total
from peft_jax.planner.program import Program
from peft_jax.planner.traffic import moved


class Device(NamedTuple):
    """A device's memory in bytes, and how much of it no program of ours gets: the driver's context, the libraries'
    workspaces, what is lost between buffers. ``margin`` is an allowance, not a measurement."""

    name: str
    bytes: int
    margin: int = 2 * 10**9


# A card sold as "80 GB" holds nearly 80 GiB; who plans for 80e9 bytes is safe on both readings.
DEVICES = (Device("80 GB (80e9 bytes)", 80 * 10**9), Device("80 GiB (85.9e9 bytes)", 80 * 2**30))


class Plan(NamedTuple):
    """What one training step needs of each device.

    assumed: the shapes and settings that it was compiled for, in words by name. program: what the compiler says.
    parts: what it is made of, before a compiler has seen it.
    """

    assumed: dict[str, Any]
    program: Program
    parts: list[Part]

    @property
    def sum(self) -> int:
        """Bytes of the parts that count."""
        return total(self.parts)

    @property
    def groups(self) -> dict[str, int]:
        """Bytes of the parts that count, by what they are of: weights, gradients, optimiser, activations, logits and
        batch. Logits are 0 where they are never there at the same time as something larger."""
        return groups(self.parts)

    def fits(self, device: Device) -> bool:
        """Whether the compiled program, with the device's margin, is no larger than the device."""
        return self.program.memory.total + device.margin <= device.bytes

    def to_dict(self) -> dict[str, Any]:
        """As ``plan.json`` holds it; all sizes in bytes."""
        memory = self.program.memory
        return {"assumed": self.assumed,
                "compiled": {"device": self.program.device, "estimate": self.program.estimate, **memory._asdict(),
                             "total": memory.total, "float32_copies": self.program.copies,
                             "devices": self.program.devices, "flops": self.program.flops,
                             "bytes_received_by_each": moved(self.program.traffic, self.program.devices)},
                "parts": [part._asdict() for part in self.parts], "groups": self.groups, "sum_of_parts": self.sum,
                "devices": [{**device._asdict(), "fits": self.fits(device)} for device in DEVICES]}


ESTIMATE = """An estimate: this is a CPU's program. Its arguments are a GPU's too, its temporaries are not: it computes
bfloat16 in float32 and holds more at once. With pip install "jax[cuda12]" and JAX_PLATFORMS=cpu the
same command compiles for an H100, on any machine."""


def describe(plan: Plan) -> str:
    """The plan for people, sizes in GB (1e9 bytes); what is in brackets is not counted again in the sum."""
    memory, where = plan.program.memory, plan.program.device
    assumed = [f"{name:<24}{value}" for name, value in plan.assumed.items()]
    parts = [line for group in GROUPS for line in _group(plan, group)]
    compiled = [_row("arguments", memory.arguments, "weights, trained parameters, optimiser, batch"),
                _row("outputs", memory.outputs, "the new state"),
                _row("aliases", -memory.aliases, "outputs in the place of arguments"),
                _row("temporaries", memory.temporaries, "all else"),
                *(_row("  of it a whole copy, wider", size, f"{path}, at times", False)
                 for path, size in plan.program.copies.items() if size > memory.total / 100),
                _row("total", memory.total, f"compiled for {where}")]
    fits = [_verdict(plan, device) for device in DEVICES]
    each = f", each of {plan.program.devices} devices" if plan.program.devices > 1 else ""
    if plan.program.devices > 1:
        compiled.append(_row("received in a step", moved(plan.program.traffic, plan.program.devices),
                             "from other devices, no memory", False))
    compiled.append(f"{plan.program.flops / 1e12:.3f} TFLOP a step in products of matrices, of all devices")
    return "\n".join([*assumed, "", f"Sum of parts (GB){each}", *parts, _row("sum", plan.sum, ""), "",
                      f"Compiled step (GB){each}", *compiled, *([ESTIMATE] if plan.program.estimate else []), "",
                      *fits])


def _group(plan: Plan, group: str) -> list[str]:
    parts = [part for part in plan.parts if part.group == group]
    return [_row(group, plan.groups[group], parts[0].recipe if len(parts) == 1 and parts[0].counted else ""),
            *(_row(f"  {part.name}", part.bytes, part.recipe, False) for part in parts
              if len(parts) > 1 or not part.counted)]


def _row(name: str, size: int, words: str, counted: bool = True) -> str:
    """
    >>> _row("batch", 1_500_000_000, "ids"), _row("a part", 20_000_000, "of it", False)
    ('batch                                 1.500   ids', 'a part                               (0.020)  of it')
    """
    shown = f"{size / 1e9:>11.3f} " if counted else f"{f'({size / 1e9:.3f})':>12}"
    return f"{name:<32}{shown}  {words}".rstrip()


def _verdict(plan: Plan, device: Device) -> str:
    need, margin = plan.program.memory.total, device.margin
    left = device.bytes - need - margin
    verdict = f"fits, {left / 1e9:.1f} GB to spare" if left >= 0 else f"does not fit, {-left / 1e9:.1f} GB too much"
    return f"{device.name + ':':<24}{verdict} ({need / 1e9:.1f} + {margin / 1e9:.1f} for context and fragmentation)"
