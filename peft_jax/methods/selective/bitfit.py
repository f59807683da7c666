"""BitFit (arXiv 2106.10199, sec. 3): only the biases train.

    y = x W + b,   b trains

A model without biases has nothing for it to train; with ``add_missing`` every chosen kernel without a bias gets one,
``bitfit_bias`` (*stack, *out), zero at the start, and the frozen switch ``bitfit_on`` (*stack).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core import kernel_axes, targeting, tree, validation
from peft_jax.core.peft_format import Format, Naming, Slot, arguments_of
from peft_jax.core.targeting import Patterns, Target
from peft_jax.errors import PeftJaxError
from peft_jax.method import TRAINABLE, Method
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods import _own_weights as own_weights

NAME = "bitfit"
KEYS = {"bitfit_bias": "bitfit_bias"}


def bitfit(target_modules: Patterns = None, *, exclude_modules: Patterns = None,
           modules_to_save: tuple[str, ...] | None = None, add_missing: bool = False) -> Method:
    """BitFit. Hugging Face peft has no such method; modules are named as in its others.

    Args:
      target_modules: modules whose bias trains, as of :func:`peft_jax.lora`; ``None`` is every bias, norms' too, and
        with add_missing also every kernel but the output head's.
      exclude_modules, modules_to_save: as of :func:`peft_jax.lora`.
      add_missing: give chosen Dense and DenseGeneral modules without a bias one. The paper's models have theirs; a
        Llama has none, nor a place for one, so that what was added cannot be merged.

    Returns a :class:`Method`; its leaves are float32. With add_missing it cannot be merged.

    >>> method = bitfit()
    >>> params = method.init(None, {"up_proj": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}})
    >>> method.labels(params)["up_proj"]
    {'kernel': 'frozen', 'bias': 'trainable'}

    Raises ``PeftJaxError`` for arguments of the wrong type, and from ``init`` for patterns that match nothing and for
    a model that has no such bias.
    """
    config = kernel_adapter.tidy(default=None, peft_type="BITFIT", target_modules=target_modules,
                                 exclude_modules=exclude_modules, modules_to_save=modules_to_save,
                                 add_missing=add_missing)
    validation.check_switches(config, "add_missing")
    return Method(
        init=partial(_init, config), intercept=_intercept, labels=_labels,
        fold=None if add_missing else partial(own_weights.merge, NAME), config=config,
        padding=partial(kernel_adapter.padding, config=_adding(config), leaves=tuple(KEYS), switch="bitfit_on"),
        stored=FORMAT, leaves=(*own_weights.leaves(NAME), *KEYS, "bitfit_on"))


def _adding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it chooses kernels to add biases to."""
    wanted = config["target_modules"]
    return {**config, "target_modules": "all-linear" if wanted is None else wanted}


def _init(config: Mapping[str, Any], rng: Any, params: Mapping[str, Any],
          axes: Mapping[str, kernel_axes.KernelAxes] | None = None) -> tree.Tree:
    flat = tree.flatten(params)
    everywhere = ".*" if config["target_modules"] is None else config["target_modules"]
    chosen = targeting.chooser(**kernel_adapter.selection({**config, "target_modules": everywhere}))
    biased = [name for one in own_weights.modules(flat, axes) if f"{one.path}/bias".lstrip("/") in flat
              for name in one.names]
    kernel_adapter.check_saved(config, params, [])
    if config["add_missing"]:
        leaves = partial(_leaves, config, flat)
        params = kernel_adapter.init(_adding(config), leaves, lambda *_: False, "bitfit_on", rng, params, axes)
    elif not any(map(chosen, biased)):
        where = "" if config["target_modules"] is None else f" in target_modules={config['target_modules']!r}"
        raise PeftJaxError(f"this model has no biases{where}: add_missing=True gives its kernels some (they cannot be "
                           "merged), or choose another method.")
    return own_weights.init(NAME, params, axes, partial(_wanted, config, chosen), required=not config["add_missing"])


def _wanted(config: Mapping[str, Any], chosen: Callable[[str], bool], path: str, module: str) -> bool:
    return (path.rpartition("/")[2] == "bias" and chosen(module)) or targeting.saved(config["modules_to_save"], module)


def _leaves(config: Mapping[str, Any], flat: Mapping[str, Any], key: Any, target: Target, kernel: Any,
            ) -> dict[str, jax.Array]:
    """A zero bias beside a kernel that has none."""
    if f"{target.path}/bias".lstrip("/") in flat:
        return {}
    _, stack, _, outputs = target.axes
    return {"bitfit_bias": jnp.zeros((*stack, *outputs), jnp.float32),
            "bitfit_on": kernel_adapter.switch(_adding(config), target)}


def _intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    y = own_weights.intercept(NAME, next_fun, args, kwargs, context)
    added = kernel_adapter.read(context.module, context, ("bitfit_bias", "bitfit_on"), "BitFit")
    if added is None:
        return y
    bias, on = added
    return y + jnp.where(on > 0, bias, 0).astype(y.dtype)


def _labels(params: Mapping[str, Any]) -> tree.Tree:
    return tree.map_paths(lambda path, label: TRAINABLE if path.rpartition("/")[2] in KEYS else label,
                          own_weights.labels(NAME, params))


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    added = [path for path in trained if path.rpartition("/")[2] in KEYS]
    own = [path for path in trained if path not in added]
    return {**own_weights.slots(NAME, flat, own, naming, lambda path, name: name),
            **adapter_file.slots(flat, added, naming, "bitfit_on", KEYS, partial(_view, _adding(config)))}


def _view(config: Mapping[str, Any], leaf: str, name: str) -> Callable | None:
    return (lambda bias: bias) if kernel_adapter.chosen(config, [name])[0] else None


FORMAT = Format(kind="BITFIT", make=bitfit, arguments=arguments_of(bitfit), slots=_slots,
                silent=("ensure_weight_tying",))
# In tables and benchmarks.
SHOWN = {"arguments": {"add_missing": True}, "note": "added biases", "checked": "equation"}
