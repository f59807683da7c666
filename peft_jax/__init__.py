"""Parameter-efficient fine-tuning for JAX and Flax, as pure functions over parameter trees.

The table of contents: each public name and the module it lives in; the methods are METHODS. A module is imported when
one of its names is first used, so that ``configs`` and ``run.py`` check a command line without waiting for jax.
"""

from importlib import import_module
from typing import Any

from peft_jax.methods import METHODS

CONTENTS = {
    # methods
    "Method": "method",
    "bind": "binding.linen",
    "chain": "method",
    "check_read": "binding.linen",
    "prefix_from_ids": "methods.soft_prompt.prefix",
    "requantize": "methods.quantize",
    # parameter trees
    "combine": "core.tree",
    "count": "core.tree",
    "flatten": "core.tree",
    "nbytes": "core.tree",
    "partition": "core.tree",
    "unflatten": "core.tree",
    "KernelAxes": "core.kernel_axes",
    "kernel_axes": "core.kernel_axes",
    # quantised weights
    "QuantizedArray": "quant",
    "dequantize": "quant",
    "quantize_array": "quant",
    # a training loop of your own, on many devices too
    "TrainState": "train.step",
    "init_state": "train.step",
    "make_step": "train.step",
    "state_shardings": "train.step",
    "value_and_grad": "quant.gradient",
    "make_mesh": "parallel.mesh",
    "place": "parallel.partitioning",
    "shardings": "parallel.partitioning",
    # models, files
    "Head": "models",
    "untie": "models",
    "load_config": "hub.load",
    "load_pretrained": "hub.load",
    "save_pretrained": "hub.save",
    "load_tokenizer": "hub.tokenizer",
    "load_adapter": "hub.adapters.load",
    "save_adapter": "hub.adapters.save",
    # many adapters on one base
    "mix_adapters": "methods.lora.batched",
    "use_adapters": "methods.lora.batched",
    "weighted_adapter": "methods.lora.combine",
    # decoding
    "Sampling": "evaluation.generation",
    "generate": "evaluation.generation",
    # memory, choice of a method
    "plan": "planner.plan",
    "recommend": "planner.recommend",
    "rule_of_thumb": "planner",
    "suggest_hardware": "planner",
    "PeftJaxError": "errors",
}
__all__ = ["METHODS", *METHODS, *CONTENTS]  # pyright: ignore[reportUnsupportedDunderAll] (names are found at run time)


def __getattr__(name: str) -> Any:
    if name in METHODS:
        return METHODS[name]
    if name not in CONTENTS:
        raise AttributeError(f"module 'peft_jax' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{CONTENTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
