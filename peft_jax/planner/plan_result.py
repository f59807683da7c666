"""A plan: the rule of thumb, the sum of parts and the compiled program side by side, and which devices hold it; as a
table and as JSON."""

from typing import Any, NamedTuple

from peft_jax.planner.breakdown import GROUPS, Part, groups, total
from peft_jax.planner.collectives import moved
from peft_jax.planner.compiled import Program
from peft_jax.planner.hardware import Device, suggest_hardware
from peft_jax.planner.rule_of_thumb import Rule


class Plan(NamedTuple):
    """What one training step needs of each device.

    assumed: the shapes and settings that it was compiled for, in words by name. program: what the compiler says.
    parts: what it is made of, before a compiler has seen it. rules: what the article would say, for all devices.
    """

    assumed: dict[str, Any]
    program: Program
    parts: list[Part]
    rules: tuple[Rule, ...]

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
        """Whether what the plan needs, with the device's margin, is no larger than the device."""
        return self.need <= device.room

    @property
    def need(self) -> int:
        """Bytes that a device must hold: as compiled; where that is a CPU's program with whole copies in float32 that
        no GPU makes, the sum of parts."""
        return self.sum if self.program.estimate and self.program.copies else self.program.memory.total

    def to_dict(self) -> dict[str, Any]:
        """As ``plan.json`` holds it; all sizes in bytes."""
        memory = self.program.memory
        return {"assumed": self.assumed,
                "compiled": {"device": self.program.device, "estimate": self.program.estimate, **memory._asdict(),
                             "total": memory.total, "float32_copies": self.program.copies,
                             "devices": self.program.devices, "flops": self.program.flops,
                             "bytes_received_by_each": moved(self.program.traffic, self.program.devices)},
                "parts": [part._asdict() for part in self.parts], "groups": self.groups, "sum_of_parts": self.sum,
                "rules_of_thumb": [{**rule._asdict(), "error": _error(self, rule)} for rule in self.rules],
                "devices": [{**one.device._asdict(), "fits": self.fits(one.device), "count": one.count,
                             "share": one.share, "words": one.words} for one in suggest_hardware(self)]}


ESTIMATE = """An estimate: this is a CPU's program. Its arguments are a GPU's too, its temporaries are not: it computes
bfloat16 in float32 and holds more at once. With pip install "jax[cuda12]" and JAX_PLATFORMS=cpu the
same command compiles for an H100, on any machine."""


def describe(plan: Plan) -> str:
    """The plan for people, sizes in GB (1e9 bytes); what is in brackets is not counted again in the sum."""
    each = f", each of {plan.program.devices} devices" if plan.program.devices > 1 else ""
    assumed = [f"{name:<24}{value}" for name, value in plan.assumed.items()]
    rules = [_rule(plan, rule) for rule in plan.rules]
    parts = [line for group in GROUPS for line in _group(plan, group)]
    summed = _row("sum", plan.sum, _percent(plan.sum, plan.program.memory.total))
    return "\n".join([*assumed, "",
                      f'Rules of thumb of the article "Full Fine-Tuning vs PEFT" (GB of 1e9 bytes){each}', *rules, "",
                      f"Sum of parts (GB of 1e9 bytes){each}", *parts, summed, "",
                      f"Compiled step (GB of 1e9 bytes){each}", *_compiled(plan.program), "", *_hardware(plan)])


def _compiled(program: Program) -> list[str]:
    memory = program.memory
    copies = [_row("  of it a whole copy, wider", size, f"{path}, at times", False)
              for path, size in program.copies.items() if size > memory.total / 100]
    received = moved(program.traffic, program.devices)
    return [_row("arguments", memory.arguments, "weights, trained parameters, optimiser, batch"),
            _row("outputs", memory.outputs, "the new state"),
            _row("aliases", -memory.aliases, "outputs in the place of arguments"),
            _row("temporaries", memory.temporaries, "all else"), *copies,
            _row("total", memory.total, f"compiled for {program.device}"),
            *([_row("received in a step", received, "from other devices, no memory", False)] if received else []),
            f"{program.flops / 1e12:.3f} TFLOP a step in products of matrices, of all devices",
            *([ESTIMATE] if program.estimate else [])]


def _error(plan: Plan, rule: Rule) -> float:
    """By how much of it a rule, its bytes shared evenly by all devices, differs from the compiled step."""
    return rule.bytes / plan.program.devices / plan.program.memory.total - 1


def _percent(size: float, compiled: int) -> str:
    """
    >>> _percent(150, 100)
    '+50 % against the compiled step'
    """
    return f"{100 * (size / compiled - 1):+.0f} % against the compiled step"


def _rule(plan: Plan, rule: Rule) -> str:
    size = rule.bytes / plan.program.devices
    return _row(rule.name, round(size), f"{_percent(size, plan.program.memory.total)}; {rule.recipe}")


def _hardware(plan: Plan) -> list[str]:
    found = suggest_hardware(plan)
    margin = found[0].device.margin
    rows = [f"{one.device.name:<12}{one.device.bytes / 1e9:>5.0f} GB  {one.count or '-':>5}  "
            f"{one.share / 1e9:>9.1f} GB each  {one.words}" for one in found]
    by = "by the sum of parts, for want of the copies that the CPU makes" if plan.need == plan.sum else "as compiled"
    return [f"Devices that hold it, {by}: the least number of each ({margin / 1e9:.1f} GB of each left for context and "
            "fragmentation; an allowance)", *rows]


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
