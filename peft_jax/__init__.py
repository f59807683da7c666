"""Parameter-efficient fine-tuning for JAX and Flax, as pure functions over parameter trees.

The table of contents: each public name and the module it lives in. A module is imported when one of its names is first
used, so that ``configs`` and ``run.py`` can check a command line without waiting for jax.
"""

from importlib import import_module

CONTENTS = {
    # methods
    "METHODS": "methods",
    "Method": "method",
    "bind": "method",
    "chain": "method",
    "check_read": "method",
    "adalora": "methods",
    "bitfit": "methods",
    "bottleneck": "methods",
    "compacter": "methods",
    "dora": "methods",
    "full": "methods",
    "houlsby": "methods",
    "hra": "methods",
    "ia3": "methods",
    "ln_tuning": "methods",
    "loha": "methods",
    "lokr": "methods",
    "lora": "methods",
    "lorafa": "methods",
    "loraplus": "methods",
    "oft": "methods",
    "parallel_adapter": "methods",
    "pfeiffer": "methods",
    "prefix": "methods",
    "prefix_from_ids": "methods",
    "prompt": "methods",
    "ptuning": "methods",
    "quantize": "methods",
    "trainable_tokens": "methods",
    "vera": "methods",
    # parameter trees
    "combine": "tree",
    "count": "tree",
    "flatten": "tree",
    "nbytes": "tree",
    "partition": "tree",
    "unflatten": "tree",
    "KernelAxes": "targets",
    "kernel_axes": "targets",
    # quantised weights
    "QuantizedArray": "quant",
    "dequantize": "quant",
    "quantize_array": "quant",
    "requantize": "methods",
    # models, files
    "Head": "models",
    "untie": "models",
    "load_config": "hub",
    "load_pretrained": "hub",
    "save_pretrained": "hub",
    "load_tokenizer": "hub",
    "load_adapter": "hub",
    "save_adapter": "hub",
    # many adapters on one base
    "mix_adapters": "mixed",
    "use_adapters": "mixed",
    "weighted_adapter": "weighted",
    # decoding
    "Sampling": "generation",
    "generate": "generation",
    # many devices, memory
    "make_mesh": "mesh",
    "shardings": "sharding",
    "plan": "train.plan",
    "recommend": "planner.recommend",
    "rule_of_thumb": "planner",
    "suggest_hardware": "planner",
    "PeftJaxError": "errors",
}
__all__ = list(CONTENTS)


def __getattr__(name: str):
    if name not in CONTENTS:
        raise AttributeError(f"module 'peft_jax' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{CONTENTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *CONTENTS})
