"""Full fine-tuning, or part of it: all leaves of the model train, or those of some names, or of the last layers
(arXiv 1911.03090 asks how many layers are enough).

    y = f(x; W),   W trains

Nothing is added to the forward pass. Trained leaves are float32 whatever the base's dtype, a master copy: flax's
modules cast them to the type that they compute in. See ``_own_weights.py`` for how some layers of a scanned stack
train.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from peft_jax.core import kernel_axes, patterns, targeting, tree, validation
from peft_jax.core.peft_format import Format, Naming, Slot, arguments_of
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.method import Method
from peft_jax.methods import _own_weights as own_weights

NAME = "full"


def full(patterns: str | Sequence[str] = (".*",), *, exclude: str | Sequence[str] = (),
         last_n_layers: int | None = None, embeddings: bool | None = None, head: bool = True) -> Method:
    """Full fine-tuning: by default every leaf trains. Hugging Face peft has none; names of leaves are ours.

    Args:
      patterns: regexes for whole paths of leaves, ``layers/self_attn/q_proj/kernel``; what one of them matches trains.
      exclude: regexes for leaves that do not train.
      last_n_layers: of the layers only the last n train; what stands outside of layers (the final norm) does too.
      embeddings: whether embeddings train; ``None``: yes, but not with last_n_layers.
      head: whether a head of its own trains. A head that is tied to the embedding is the embedding; ``untie`` it first
        to train one of them.

    In a chain name it first. Returns a :class:`Method`. With the defaults there is no adapter to save: save the whole
    model, ``save_pretrained(folder, model, method.merge(params))``.

    >>> import jax.numpy as jnp
    >>> method = full()
    >>> params = method.init(None, {"up_proj": {"kernel": jnp.ones((6, 8), jnp.bfloat16)}})
    >>> params["up_proj"]["kernel"].dtype.name, method.labels(params)["up_proj"]
    ('float32', {'kernel': 'trainable'})

    Raises ``PeftJaxError`` for arguments of the wrong type, and from ``init`` for a pattern that matches no leaf, more
    layers than there are, or where nothing is left to train.
    """
    config = {"peft_type": "FULL", "patterns": _listed(patterns), "exclude": _listed(exclude),
              "last_n_layers": last_n_layers, "embeddings": embeddings, "head": head}
    validation.check_regexes([*config["patterns"], *config["exclude"]])
    if last_n_layers is not None:
        validation.check_whole("last_n_layers", last_n_layers)
    validation.check_choice("embeddings", embeddings, (None, True, False))
    validation.check_switches(config, "head")
    everything = config["patterns"] == (".*",) and not (exclude or last_n_layers or embeddings is False or not head)
    stored = None if everything else FORMAT
    return Method(partial(_init, config), config=config, stored=stored, **own_weights.bound(NAME))


def _listed(patterns: Any) -> tuple[str, ...]:
    several = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    regexes: tuple[Any, ...] = tuple(patterns) if several else () if patterns is None else (patterns,)
    if not all(isinstance(one, str) for one in regexes):
        raise PeftJaxError(f"{patterns!r}: give regular expressions for the paths of leaves, such as '.*/bias'.")
    return regexes


def _init(config: Mapping[str, Any], rng: Any, params: Mapping[str, Any],
          axes: Mapping[str, kernel_axes.KernelAxes] | None = None) -> tree.Tree:
    flat = tree.flatten(params)
    for pattern in (*config["patterns"], *config["exclude"]):
        if not any(patterns.match(pattern, path, whole=True) for path in flat):
            raise PeftJaxError(f"the pattern '{pattern}' matches no leaf of this model: {nearest(pattern, flat)}")
    return own_weights.init(NAME, params, axes, partial(_wanted, config, _first_layer(config, flat, axes)))


def _first_layer(config: Mapping[str, Any], flat: Mapping[str, Any],
                 axes: Mapping[str, kernel_axes.KernelAxes] | None) -> int:
    """The number of the first layer that trains."""
    if config["last_n_layers"] is None:
        return 0
    numbers = [targeting.layer_index(f"{name}.", None) for folder, stack in targeting.stacks(flat, axes).items()
               for name in targeting.module_names(folder, stack)]
    depth = max((number + 1 for number in numbers if number is not None), default=0)
    if config["last_n_layers"] > depth:
        raise PeftJaxError(f"last_n_layers={config['last_n_layers']}: this model has {depth} numbered layers; give at "
                           "most that, or patterns.")
    return depth - config["last_n_layers"]


def _wanted(config: Mapping[str, Any], first: int, path: str, module: str) -> bool:
    layer = targeting.layer_index(f"{module}.", None)
    if layer is not None and layer < first:
        return False
    if set(module.split(".")) & set(targeting.HEADS):
        allowed = config["head"]
    elif "embed" in path and layer is None:
        allowed = config["last_n_layers"] is None if config["embeddings"] is None else config["embeddings"]
    else:
        allowed = True
    rules = [(pattern, False) for pattern in config["exclude"]] + [(pattern, True) for pattern in config["patterns"]]
    return allowed and tree.first_match(rules, path, False)


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    return own_weights.slots(NAME, flat, trained, naming, lambda path, name: name)


FORMAT = Format(kind="FULL", make=full, arguments=arguments_of(full), slots=_slots, silent=("ensure_weight_tying",))
SHOWN = {"checked": "transformers"}  # in tables and benchmarks
