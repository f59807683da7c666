"""Parameter-efficient fine-tuning for JAX and Flax, as pure functions over parameter trees.

The table of contents: each public name and the module it lives in. A module is imported when one of its names is first
used, so that ``configs`` and ``run.py`` can check a command line without waiting for jax.
"""

from importlib import import_module

CONTENTS = {
    # methods
    "Method": "method",
    "bind": "method",
    "chain": "method",
    "check_read": "method",
    "METHODS": "methods",
    "dora": "methods",
    "ia3": "methods",
    "lora": "methods",
    "lorafa": "methods",
    "loraplus": "methods",
    # parameter trees
    "combine": "tree",
    "count": "tree",
    "flatten": "tree",
    "nbytes": "tree",
    "partition": "tree",
    "unflatten": "tree",
    "KernelAxes": "targets",
    "kernel_axes": "targets",
    # models, files
    "untie": "models",
    "load_pretrained": "hub",
    "save_pretrained": "hub",
    "load_tokenizer": "hub",
    "load_adapter": "hub",
    "save_adapter": "hub",
    # decoding
    "Sampling": "generation",
    "generate": "generation",
    "PeftJaxError": "errors",
}
__all__ = list(CONTENTS)


def __getattr__(name: str):
    if name not in CONTENTS:
        raise AttributeError(f"module 'peft_jax' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{CONTENTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *CONTENTS})
