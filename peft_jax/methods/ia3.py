"""IA3, learned rescaling of activations (arXiv 2205.05638, eq. 1).

    keys, values:   y = l * (x W + b)         feed-forward:   y = (l * x) W + b

Beside each adapted ``kernel`` stands ``ia3_out`` (*stack, *out), or ``ia3_in`` (*stack, *in) for a feed-forward module,
and the frozen switch ``ia3_on`` (*stack), zero for layers of a stack that are not adapted. l starts at one, so training
starts from the base model.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core import kernel_axes, targeting, tree, validation
from peft_jax.core.peft_format import Naming
from peft_jax.core.targeting import Patterns, Target
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.method import Method, check_leaves
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.quant import plain

DEFAULT = ("down_proj",)
LEAVES = ("ia3_in", "ia3_out", "ia3_on")


def ia3(target_modules: Patterns = ("k_proj", "v_proj", "down_proj"), feedforward_modules: Patterns = ("down_proj",), *,
        exclude_modules: Patterns = None, modules_to_save: tuple[str, ...] | None = None,
        init_ia3_weights: bool = True) -> Method:
    """IA3 with the arguments and meanings of Hugging Face peft's ``IA3Config``; defaults are peft's for a Llama.

    Args:
      target_modules: as of :func:`peft_jax.lora`.
      feedforward_modules: those of them whose input is scaled instead of the output, a list of endings or a regex.
      exclude_modules, modules_to_save: as of :func:`peft_jax.lora`.
      init_ia3_weights: False starts from normal random numbers (not the base model; for tests).

    Returns a :class:`Method`; its leaves are float32.

    >>> method = ia3(target_modules=("up_proj",), feedforward_modules=())
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items()}
    {'kernel': (6, 8), 'ia3_out': (8,), 'ia3_on': ()}

    Raises ``PeftJaxError`` for arguments of the wrong type, and from ``init`` for patterns that match nothing and for
    a stack of which only some layers are feed-forward modules.
    """
    config = kernel_adapter.tidy(
        peft_type="IA3", target_modules=target_modules, feedforward_modules=feedforward_modules,
        exclude_modules=exclude_modules, modules_to_save=modules_to_save, init_ia3_weights=init_ia3_weights,
        default=("k_proj", "v_proj", "down_proj"))
    validation.check_modules("feedforward_modules", feedforward_modules)
    validation.check_switches(config, "init_ia3_weights")
    method = kernel_adapter.method(
        config, trained=LEAVES[:2], switch="ia3_on", leaves=_leaves, intercept=_intercept, stored=FORMAT,
        along={"ia3_in": ("inputs",), "ia3_out": ("outputs",)})
    return method._replace(init=partial(_init, config, method), fold=_merge, vectors=LEAVES[:2])


def _init(config: Mapping[str, Any], method: Method, rng: jax.Array, params: Mapping[str, Any],
          axes: Mapping[str, Any] | None = None) -> tree.Tree:
    _check_feedforward(config, targeting.find(params, axes, kernel_adapter.selection(config)))
    return method.init(rng, params, axes)


def _check_feedforward(config: Mapping[str, Any], targets: list[Target]) -> None:
    """What is named in vain would be scaled on its other side; the default alone need not be there."""
    wanted = config["feedforward_modules"] if config["feedforward_modules"] != DEFAULT else ()
    names = [name for target in targets for name in target.names if kernel_adapter.chosen(config, [name])[0]]
    if (said := targeting.unmatched(wanted, names)) is not None:
        raise PeftJaxError(f"feedforward_modules has '{said}', which matches none of the adapted modules (a string is "
                           "a regex for whole names, endings go into a list): "
                           f"{nearest(said, (name.rsplit('.', 1)[-1] for name in names))}")


def _leaves(config: Mapping[str, Any], key: jax.Array, target: Target, kernel: Any) -> dict[str, jax.Array]:
    inside = {targeting.listed(config["feedforward_modules"] or (), name) for name in target.names}
    if len(inside) > 1:
        raise PeftJaxError(f"feedforward_modules={config['feedforward_modules']!r} names some layers of the stack "
                           f"'{target.path}' and not others: one leaf scales all inputs or all outputs.")
    _, stack, inputs, outputs = target.axes
    name, width = ("ia3_in", inputs) if inside.pop() else ("ia3_out", outputs)
    start = jnp.ones((*stack, *width), jnp.float32)
    if not config["init_ia3_weights"]:
        start = jax.random.normal(key, start.shape, jnp.float32)
    return {name: start, "ia3_on": kernel_adapter.switch(config, target)}


def _intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if leaves := kernel_adapter.read(module, context, ("ia3_in", "ia3_on"), "IA3"):
        x = kernel_axes.inputs_last(module, args[0])
        return next_fun(kernel_axes.inputs_back(module, x * _scale(leaves[0], leaves[1], x.dtype)), *args[1:], **kwargs)
    y = next_fun(*args, **kwargs)
    leaves = kernel_adapter.read(module, context, ("ia3_out", "ia3_on"), "IA3")
    return y * _scale(leaves[0], leaves[1], y.dtype) if leaves else y


def _scale(scale: jax.Array, on: jax.Array, dtype: Any) -> jax.Array:
    """l, and one where the layer is not adapted, whatever an optimiser did to it there."""
    return jnp.where(on.reshape(*on.shape, *[1] * (scale.ndim - on.ndim)) > 0, scale, 1).astype(dtype)


def _merge(params: Mapping[str, Any]) -> tree.Tree:
    """Scale the rows or columns of each kernel, and the bias behind scaled columns; back to their own dtypes."""
    check_leaves(LEAVES, params, "IA3")
    flat = tree.flatten(params)
    for folder in kernel_adapter.folders(flat, "ia3_on"):
        on = flat.pop(folder + "ia3_on")
        name = "ia3_in" if folder + "ia3_in" in flat else "ia3_out"
        scale = _scale(flat.pop(folder + name), on, jnp.float32)
        kernel, inside = flat[folder + "kernel"], scale.ndim - on.ndim
        other = kernel.ndim - scale.ndim
        at = (*scale.shape, *[1] * other) if name == "ia3_in" else (*on.shape, *[1] * other, *scale.shape[on.ndim:])
        flat[folder + "kernel"] = (plain(kernel, jnp.float32) * scale.reshape(at)).astype(kernel.dtype)
        if name == "ia3_out" and (bias := flat.get(folder + "bias")) is not None and inside:
            flat[folder + "bias"] = (bias.astype(jnp.float32) * scale).astype(bias.dtype)
    return tree.unflatten(flat)


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """peft matches feedforward_modules by the ends of whole names too."""
    feedforward = config["feedforward_modules"]
    both = {theirs for ours, theirs in naming.pairs if targeting.listed(feedforward or (), ours)}
    told = {theirs for _, theirs in naming.pairs if targeting.listed(feedforward or (), theirs)}
    listed = feedforward if both == told else tuple(both)
    return {**adapter_file.fields(config, flat, naming), "feedforward_modules": listed,
            "fan_in_fan_out": naming.fan_in_fan_out}


# peft keeps a row (1, in) for inputs and a column (out, 1) for outputs.
FORMAT = adapter_file.stored(
    ia3, "IA3", "ia3_on", {"ia3_in": ("ia3_l", lambda scale: scale.reshape(1, -1)),
                           "ia3_out": ("ia3_l", lambda scale: scale.reshape(-1, 1))},
    fields=_fields, silent=("fan_in_fan_out",))
