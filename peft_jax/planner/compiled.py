"""The compiled step: what its own memory analysis says, and what of that is true of one backend alone."""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax import quant
from peft_jax.core import tree
from peft_jax.planner.collectives import Collective, collectives
from peft_jax.planner.flops import flops
from peft_jax.planner.target_device import Target


class Memory(NamedTuple):
    """Bytes of a compiled program: its arguments, its outputs, those outputs that take an argument's place, and what it
    needs in between."""

    arguments: int
    outputs: int
    aliases: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliases + self.temporaries


class Program(NamedTuple):
    """memory: of the compiled step. device: what it was compiled for. estimate: whether that is a CPU in the place of
    another device. copies: ``{path: bytes}``, see :func:`whole_copies`. devices: that run it together; the memory is
    that of one. traffic: what travels between them. flops: of all devices' products of matrices, in one step."""

    memory: Memory
    device: str
    estimate: bool
    copies: dict[str, int]
    devices: int = 1
    traffic: tuple[Collective, ...] = ()
    flops: int = 0


def compile_step(step: Any, state: Any, frozen: tree.Tree, batch: Any, target: Target | None = None,
                 devices: int = 1) -> Program:
    """``step(state, frozen, batch)``, jitted, compiled for shapes: nothing is allocated, nothing runs.

    ``target`` is a device that need not be there, by default the first one of the default backend. Of several
    ``devices`` the shapes say where they lie.
    """
    target = target or Target(jax.devices()[0].device_kind, None, {})
    compiled = step.lower(*target.place((state, frozen, batch))).compile(target.options)
    text = compiled.as_text()
    return Program(memory_of(compiled), target.name, target.sharding is None and jax.default_backend() == "cpu",
                   whole_copies(text, frozen, state) if devices == 1 else {}, devices, tuple(collectives(text)),
                   flops(step, state, frozen, batch))


def memory_of(compiled: Any) -> Memory:
    """What a compiled jax program says of its memory."""
    found = compiled.memory_analysis()
    return Memory(found.argument_size_in_bytes, found.output_size_in_bytes, found.alias_size_in_bytes,
                  found.temp_size_in_bytes)


def whole_copies(text: str, frozen: tree.Tree, others: Any = ()) -> dict[str, int]:
    """``{path: bytes}`` of the frozen leaves that a compiled program's text makes a wider array of, of a whole leaf.

    A CPU computes bfloat16 in float32 and takes that conversion out of the loops (DESIGN.md); of a quantised leaf this
    would be every layer decoded at once. Shapes are all that tells: those of ``others`` are left out.

    >>> whole_copies("%c = f32[2,8]{1,0} convert(%p)", {"a": jax.ShapeDtypeStruct((2, 8), jnp.bfloat16)})
    {'a': 64}
    """
    made = {(kind, tuple(map(int, sizes.split(",")))) for kind, sizes in
            re.findall(r"= \(?(f32|bf16)\[([\d,]+)\]", _outside_fusions(text))}
    made -= {(kind, leaf.shape) for leaf in jax.tree.leaves((others, frozen)) for kind, name in
             (("f32", "float32"), ("bf16", "bfloat16")) if leaf.dtype.name == name}
    found = {}
    for path, leaf in tree.flatten(frozen).items():
        for kind, width in (("f32", 4), ("bf16", 2)):
            if any((kind, shape) in made for shape in _shapes(leaf, width)):
                found[path] = max(width * leaf.size, found.get(path, 0))
    return found


def _shapes(leaf, width: int) -> list[tuple[int, ...]]:
    """The shapes that a whole copy of ``leaf`` in values of ``width`` bytes could have."""
    if not quant.is_leaf(leaf):
        wider = np.dtype(leaf.dtype).itemsize < width and leaf.ndim > 1
        return [tuple(leaf.shape)] if wider else []
    sizes = (1, math.prod(leaf.matrix)) if leaf.flat else leaf.matrix
    return [(*leaf.stack, *one) for one in (sizes, sizes[::-1], leaf.inputs + leaf.outputs)] if leaf.stack else []


def _outside_fusions(text: str) -> str:
    """A program's text without the bodies of fusions, whose intermediate values are never written to memory."""
    fused = set(re.findall(r"calls=%([\w.-]+)", text))
    blocks = re.split(r"\n(?=%|ENTRY )", text)
    return "\n".join(block for block in blocks if re.split(r"[ (]", block.lstrip("%"), maxsplit=1)[0] not in fused)
