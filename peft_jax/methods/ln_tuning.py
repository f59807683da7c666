"""LayerNorm tuning (arXiv 2312.11420, sec. 3): of the whole model only the norms' scales, and biases, train.

    y = norm(x) * g + b,   g and b train

Nothing is added to the forward pass; see :mod:`peft_jax.whole`.
"""

from functools import partial
from typing import Any

from peft_jax import beside, targets, tree, whole
from peft_jax.method import Method
from peft_jax.stored import Format
from peft_jax.targets import Patterns

NAME = "ln_tuning"
DEFAULT = ("input_layernorm", "post_attention_layernorm", "norm")
SELECTION = ("target_modules", "exclude_modules", "modules_to_save")


def ln_tuning(target_modules: Patterns = DEFAULT, *, exclude_modules: Patterns = None,
              modules_to_save: tuple[str, ...] | None = None) -> Method:
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
    config = beside.tidy({"peft_type": "LN_TUNING", "layers_to_transform": None, "layers_pattern": None, **locals()},
                         DEFAULT)
    return Method(partial(_init, config), config=config, stored=FORMAT, **whole.bound(NAME))


def _init(config, rng, params, axes=None):
    flat = tree.flatten(params)
    owners = whole.modules(flat, axes)
    whole.check_names("target_modules", config["target_modules"], [name for one in owners for name in one.names])
    chosen = targets.chooser(**beside.selection(config) | {"modules_to_save": None})
    beside.check_saved(config, params, [one for one in owners if any(map(chosen, one.names))])
    return whole.init(NAME, params, axes, partial(_wanted, config, chosen))


def _wanted(config, chosen, path, module) -> bool:
    return chosen(module) or targets.saved(config["modules_to_save"], module)


def _slots(config, flat, trained, naming) -> dict[str, Any]:
    return whole.slots(NAME, flat, trained, naming, partial(_key, config))


def _key(config, path, name) -> str:
    """A module in peft's file is wrapped: ``norm.ln_tuning_layers.weight``; saved ones keep their names."""
    if targets.saved(config["modules_to_save"], path.rpartition("/")[0].replace("/", ".")):
        return name
    module, _, weight = name.rpartition(".")
    return f"{module}.ln_tuning_layers.{weight}"


def _fields(config, flat, naming) -> dict[str, Any]:
    return beside.fields(config, flat, naming._replace(pairs=naming.owners))


FORMAT = Format("LN_TUNING", ln_tuning, SELECTION, _slots, _fields)
