"""Fine-tuning methods: this is the one list of them. Every other list of methods is derived from it.

A method is one file, named here; its function has the method's name. The file is imported when it is first used. It may
hold ``FORMAT``, how its adapters are stored, and ``SHOWN``, what tables and benchmarks of all methods say of it:
``{"arguments": ..., "note": what these are, "checked": against what, "step": more arguments where a step is timed}``,
or ``None`` where they leave it out.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this file imports no jax, so that command lines are checked at once
    from peft_jax.core.peft_format import Format
    from peft_jax.method import Method


class _Files(Mapping[str, "Callable[..., Method]"]):
    """``{name: the method's function}``, from ``{name: its file}``."""

    def __init__(self, files: Mapping[str, str]):
        self.files = files

    def __getitem__(self, name: str) -> "Callable[..., Method]":
        return getattr(self.module(name), name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def module(self, name: str) -> ModuleType:
        """The file of a method, imported."""
        return import_module(f"{__name__}.{self.files[name]}")


# {the name that config.method.name has: the file below this folder}. configs/methods.py reads it without importing jax.
METHODS = _Files({
    "adalora": "adalora.adalora",
    "bitfit": "selective.bitfit",
    "bottleneck": "bottleneck.bottleneck",
    "compacter": "bottleneck.compacter",
    "dora": "lora.dora",
    "full": "selective.full",
    "houlsby": "bottleneck.houlsby",
    "hra": "hra",
    "ia3": "ia3",
    "ln_tuning": "selective.ln_tuning",
    "loha": "lycoris.loha",
    "lokr": "lycoris.lokr",
    "lora": "lora.lora",
    "lorafa": "lora.lora_fa",
    "loraplus": "lora.lora_plus",
    "miss": "miss",
    "oft": "oft",
    "parallel_adapter": "bottleneck.parallel_adapter",
    "pfeiffer": "bottleneck.pfeiffer",
    "prefix": "soft_prompt.prefix",
    "prompt": "soft_prompt.prompt",
    "ptuning": "soft_prompt.p_tuning",
    "quantize": "quantize",
    "trainable_tokens": "selective.trainable_tokens",
    "vera": "vera",
})


def formats() -> "tuple[Format, ...]":
    """The kinds of adapter file that can be read: the ``FORMATS`` of every method's file, or its one ``FORMAT``."""
    modules = dict.fromkeys(map(METHODS.module, METHODS))
    of_each = [getattr(module, "FORMATS", (getattr(module, "FORMAT", None),)) for module in modules]
    return tuple(dict.fromkeys(one for some in of_each for one in some if one))
