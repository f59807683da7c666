"""LayerNorm tuning (arXiv 2312.11420, sec. 3): of the whole model only the norms' scales, and biases, train.

    y = norm(x) * g + b,   g and b train

Nothing is added to the forward pass; see :mod:`peft_jax.methods._own_weights`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from peft_jax.core import kernel_axes, targeting, tree
from peft_jax.core.peft_format import Format, Naming, Slot, arguments_of
from peft_jax.core.targeting import Patterns
from peft_jax.method import Method
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods import _own_weights as own_weights

NAME = "ln_tuning"


def ln_tuning(target_modules: Patterns = ("input_layernorm", "post_attention_layernorm", "norm"), *,
              exclude_modules: Patterns = None, modules_to_save: tuple[str, ...] | None = None) -> Method:
    """LayerNorm tuning with the arguments of Hugging Face peft's ``LNTuningConfig``; defaults are peft's for a Llama.

    Args:
      target_modules: names, or endings of names, of modules whose leaves train, or a regex for whole names. Norms are
        meant; other modules that own weights may be named as well, as in peft.
      exclude_modules, modules_to_save: as of :func:`peft_jax.lora`.

    Returns a :class:`Method`; trained leaves are float32.

    >>> import jax.numpy as jnp
    >>> method = ln_tuning(["norm"])
    >>> params = method.init(None, {"norm": {"scale": jnp.ones(8)}, "up_proj": {"kernel": jnp.ones((8, 8))}})
    >>> method.labels(params)["norm"], method.labels(params)["up_proj"]
    ({'scale': 'trainable'}, {'kernel': 'frozen'})

    Raises ``PeftJaxError`` for arguments of the wrong type, and from ``init`` for names that match nothing.
    """
    config = kernel_adapter.tidy(default=("input_layernorm", "post_attention_layernorm", "norm"), peft_type="LN_TUNING",
                                 target_modules=target_modules, exclude_modules=exclude_modules,
                                 modules_to_save=modules_to_save)
    return Method(partial(_init, config), config=config, stored=FORMAT, **own_weights.bound(NAME))


def _init(config: Mapping[str, Any], rng: Any, params: Mapping[str, Any],
          axes: Mapping[str, kernel_axes.KernelAxes] | None = None) -> tree.Tree:
    flat = tree.flatten(params)
    owners = own_weights.modules(flat, axes)
    own_weights.check_names("target_modules", config["target_modules"], [name for one in owners for name in one.names])
    chosen = targeting.chooser(**kernel_adapter.selection(config) | {"modules_to_save": None})
    kernel_adapter.check_saved(config, params, [one for one in owners if any(map(chosen, one.names))])
    return own_weights.init(NAME, params, axes, partial(_wanted, config, chosen))


def _wanted(config: Mapping[str, Any], chosen: Callable[[str], bool], path: str, module: str) -> bool:
    return chosen(module) or targeting.saved(config["modules_to_save"], module)


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    return own_weights.slots(NAME, flat, trained, naming, partial(_key, config))


def _key(config: Mapping[str, Any], path: str, name: str) -> str:
    """A module in peft's file is wrapped: ``norm.ln_tuning_layers.weight``; saved ones keep their names."""
    if targeting.saved(config["modules_to_save"], path.rpartition("/")[0].replace("/", ".")):
        return name
    module, _, weight = name.rpartition(".")
    return f"{module}.ln_tuning_layers.{weight}"


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    return adapter_file.fields(config, flat, naming._replace(pairs=naming.owners))


FORMAT = Format(kind="LN_TUNING", make=ln_tuning, arguments=arguments_of(ln_tuning), slots=_slots, fields=_fields)
