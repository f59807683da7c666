"""BitFit (arXiv 2106.10199, sec. 3): only the biases train.

    y = x W + b,   b trains

A model without biases has nothing for it to train; with ``add_missing`` every chosen kernel without a bias gets one,
``bitfit_bias`` (*stack, *out), zero at the start, and the frozen switch ``bitfit_on`` (*stack).
"""

from functools import partial
from typing import Any

import jax.numpy as jnp

from peft_jax import arguments, beside, targets, tree, whole
from peft_jax.errors import PeftJaxError
from peft_jax.method import TRAINABLE, Method
from peft_jax.stored import Format
from peft_jax.targets import Patterns

NAME = "bitfit"
KEYS = {"bitfit_bias": "bitfit_bias"}


def bitfit(target_modules: Patterns = None, *, exclude_modules: Patterns = None,
           modules_to_save: tuple[str, ...] | None = None, add_missing: bool = False) -> Method:
    """BitFit; Hugging Face peft has none of its own, its words for modules are used.

    Args:
      target_modules: modules whose bias trains, as of :func:`peft_jax.lora`; ``None`` is every bias, norms' too, and
        with add_missing also every kernel but the output head's.
      exclude_modules, modules_to_save: as of :func:`peft_jax.lora`.
      add_missing: give chosen Dense and DenseGeneral modules without a bias one. The paper's models have theirs; a
        Llama has none, nor a place for one, so that what was added cannot be merged.

    Returns a :class:`Method`; its leaves are float32. ``merge`` is ``None`` with add_missing.

    >>> method = bitfit()
    >>> params = method.init(None, {"up_proj": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}})
    >>> method.labels(params)["up_proj"]
    {'kernel': 'frozen', 'bias': 'trainable'}

    Raises ``PeftJaxError`` for arguments of the wrong type, and from ``init`` for patterns that match nothing and for
    a model that has no such bias.
    """
    config = beside.tidy({"peft_type": "BITFIT", "layers_to_transform": None, "layers_pattern": None, **locals()}, None)
    arguments.check_switches(config, "add_missing")
    padding = partial(beside.padding, config=_adding(config), leaves=tuple(KEYS), switch="bitfit_on")
    return Method(partial(_init, config), _intercept, _labels, None if add_missing else partial(whole.merge, NAME),
                  config, padding, FORMAT, leaves=(*whole.leaves(NAME), *KEYS, "bitfit_on"))


def _adding(config) -> dict[str, Any]:
    """The configuration as it chooses kernels to add biases to."""
    wanted = config["target_modules"]
    return {**config, "target_modules": "all-linear" if wanted is None else wanted}


def _init(config, rng, params, axes=None):
    flat = tree.flatten(params)
    everywhere = ".*" if config["target_modules"] is None else config["target_modules"]
    chosen = targets.chooser(**beside.selection({**config, "target_modules": everywhere}))
    biased = [name for one in whole.modules(flat, axes) if f"{one.path}/bias".lstrip("/") in flat for name in one.names]
    beside.check_saved(config, params, [])
    if config["add_missing"]:
        params = beside.init(_adding(config), partial(_leaves, config, flat), lambda *_: False, rng, params, axes)
    elif not any(map(chosen, biased)):
        where = "" if config["target_modules"] is None else f" in target_modules={config['target_modules']!r}"
        raise PeftJaxError(f"this model has no biases{where}: add_missing=True gives its kernels some (they cannot be "
                           "merged), or choose another method.")
    return whole.init(NAME, params, axes, partial(_wanted, config, chosen), required=not config["add_missing"])


def _wanted(config, chosen, path, module) -> bool:
    return (path.rpartition("/")[2] == "bias" and chosen(module)) or targets.saved(config["modules_to_save"], module)


def _leaves(config, flat, key, target, kernel):
    """A zero bias beside a kernel that has none."""
    if f"{target.path}/bias".lstrip("/") in flat:
        return {}
    _, stack, _, outputs = target.axes
    return {"bitfit_bias": jnp.zeros((*stack, *outputs), jnp.float32),
            "bitfit_on": beside.switch(_adding(config), target)}


def _intercept(next_fun, args, kwargs, context):
    y = whole.intercept(NAME, next_fun, args, kwargs, context)
    held = beside.read(context.module, context, ("bitfit_bias", "bitfit_on"), "BitFit")
    if held is None:
        return y
    bias, on = held
    return y + jnp.where(on > 0, bias, 0).astype(y.dtype)


def _labels(params):
    flat = tree.flatten(whole.labels(NAME, params))
    return tree.unflatten({path: TRAINABLE if path.rpartition("/")[2] in KEYS else label
                           for path, label in flat.items()})


def _slots(config, flat, trained, naming) -> dict[str, Any]:
    added = [path for path in trained if path.rpartition("/")[2] in KEYS]
    own = [path for path in trained if path not in added]
    return {**whole.slots(NAME, flat, own, naming, lambda path, name: name),
            **beside.slots(flat, added, naming, "bitfit_on", KEYS, partial(_view, _adding(config)))}


def _view(config, leaf, name):
    return (lambda bias: bias) if beside.chosen(config, [name])[0] else None


FORMAT = Format("BITFIT", bitfit, ("target_modules", "exclude_modules", "modules_to_save", "add_missing"), _slots,
                silent=("ensure_weight_tying",))
