"""A quantised base, as QLoRA has it (arXiv 2305.14314, eqs. 1 to 6): weights in blocks of codes and scales.

    W ~ table[codes] * scale        scale = max |W| of a block; with double_quant in 8 bits itself, less its mean

Each chosen ``kernel`` or ``embedding`` becomes a :class:`peft_jax.QuantizedArray` in its place; nothing trains. Another
method of a chain trains leaves beside it: QLoRA is ``chain(quantize(double_quant=True), lora(...))``. A method in front
sees the plain weights: ``chain(lora(init_lora_weights="pissa"), quantize())`` quantises what PiSSA leaves of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp

from peft_jax import quant
from peft_jax.core import arguments, kernel_axes, targeting, tree, validation
from peft_jax.core.targeting import Patterns, Target
from peft_jax.errors import PeftJaxError
from peft_jax.method import BASE, Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods import _own_weights as own_weights

SELECTION = ("target_modules", "exclude_modules")


def quantize(quant_type: str = "nf4", block_size: int | None = 64, double_quant: bool = False,
             target_modules: Patterns = "all-linear", exclude_modules: Patterns = None,
             product: str = "plain") -> Method:
    """Weights in four or eight bits; ``bind`` knows how to read them under any other method.

    Args:
      quant_type: "nf4", "fp4", "int4", "int4_affine" or "int8", see :func:`peft_jax.quantize_array`; bitsandbytes'
        ``bnb_4bit_quant_type``.
      block_size: how many values along the inputs share a scale; ``None`` gives each output one scale.
      double_quant: keep the scales in 8 bits, 256 of them with one scale of their own; bitsandbytes'
        ``bnb_4bit_use_double_quant``.
      target_modules: as of :func:`peft_jax.lora`; "all-linear" is every kernel but the output head. Embeddings are
        quantised where they are named. exclude_modules: modules to leave out; bitsandbytes' ``llm_int8_skip_modules``.
      product: "plain" decodes a weight before each product with it. "fused" decodes it inside of the product, by a
        Pallas kernel that nobody has timed yet: for blocks of 32, 64 or 128, on Hopper GPUs (H100, H200) for bfloat16
        activations and weights of a multiple of 64 outputs and inputs, on TPUs for float32, too; not for weights
        sharded over devices. Where there is no such kernel, it is "plain"; ``peft_jax.quant.pallas.why_plain`` says
        why. "interpreted": the TPU's kernel, slowly, on any platform, to check it.

    Returns a :class:`Method`; its ``merge`` gives the plain weights that the codes stand for, in the dtype that the
    weights had.

    >>> params = quantize().init(None, {"up_proj": {"kernel": jnp.ones((64, 8))}})
    >>> params["up_proj"]["kernel"].codes.shape, params["up_proj"]["kernel"].nbytes
    ((8, 32), 288)

    Raises ``PeftJaxError`` for an unknown codec. ``init`` raises it for target_modules that match nothing or only some
    layers of a stack, and for weights that train, are quantised in another way, or hold infinite values or NaN.
    """
    config = {"peft_type": "QUANTIZE", "quant_type": quant_type, "block_size": block_size,
              "double_quant": double_quant, "target_modules": target_modules, "exclude_modules": exclude_modules,
              "product": product}
    quant.check(quant_type, block_size, double_quant)
    validation.check_choice("product", product, quant.PRODUCTS)
    for name in SELECTION:
        validation.check_modules(name, config[name])
    return conversion(config)


def conversion(config: Mapping[str, Any], holders: Sequence[str] = kernel_axes.HOLDERS) -> Method:
    """:func:`quantize` of a config that may also have ``layers_to_transform``, ``layers_pattern`` and
    ``modules_to_save``, as of a LoRA; leaves of other names than ``holders`` stay as they are."""
    return BASE._replace(init=partial(_init, config, holders), fold=_fold, config=config,
                         convert=partial(_convert, config, holders))


def _selection(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config.get(name) for name in kernel_adapter.SELECTION}


def _init(config: Mapping[str, Any], holders: Sequence[str], rng: Any, params: Mapping[str, Any],
          axes: Mapping[str, kernel_axes.KernelAxes] | None = None) -> tree.Tree:
    flat = tree.flatten(params)
    trains = own_weights.marks_of(flat)
    for target in targeting.find(params, axes, _selection(config), holders):
        path = f"{target.path}/{target.leaf}".lstrip("/")
        flat[path] = _quantized(config, target, path, flat[path])
        if path in trains:  # in some of its layers perhaps: then no label of the leaf itself would tell
            raise quant.cannot_train(path, flat[path])
    return tree.unflatten(flat)


def _quantized(config: Mapping[str, Any], target: Target, path: str, leaf: Any) -> quant.QuantizedArray:
    chosen = targeting.chooser(**_selection(config))
    if left := [name for name in target.names if not chosen(name)]:
        raise PeftJaxError(f"'{path}' is one leaf for {len(target.names)} layers, and the patterns leave out "
                           f"'{left[0]}': name modules of all its layers, or of none.")
    if quant.is_leaf(leaf):
        _check_same(config, path, leaf)
        return leaf if leaf.product == config["product"] else dataclasses.replace(leaf, product=config["product"])
    return _encoded(path, leaf, config["product"], config["quant_type"], block_size=config["block_size"],
                    double_quant=config["double_quant"], stack=target.axes.stack, inputs=target.axes.inputs,
                    outputs=target.axes.outputs, by_rows=target.leaf == "embedding")


def _encoded(path: str, array: Any, product: str, quant_type: str, **options: Any) -> quant.QuantizedArray:
    """:func:`peft_jax.quantize_array`, whose errors say where."""
    try:
        return dataclasses.replace(quant.quantize_array(array, quant_type, **options), product=product)
    except PeftJaxError as error:
        raise PeftJaxError(f"'{path}': {error}") from error


def _check_same(config: Mapping[str, Any], path: str, leaf: quant.QuantizedArray) -> None:
    have = (leaf.quant_type, leaf.block_size, leaf.double_quant)
    want = (config["quant_type"], config["block_size"] or 0, config["double_quant"])
    if have != want:
        told = "quant_type={!r}, block_size={}, double_quant={}".format
        raise PeftJaxError(f"'{path}' is quantised already, with {told(*have)}, not {told(*want)}: ask for the same, "
                           "or start from plain weights, load_pretrained(keep_quantised=False).")


def _convert(config: Mapping[str, Any], holders: Sequence[str], path: str, array: Any, axes: kernel_axes.KernelAxes,
             names: Sequence[str]) -> Any:
    """One entry of a leaf's stack while it is read from a file, quantised if it is meant; see ``Method.convert``."""
    module, _, leaf = path.rpartition("/")
    meant = targeting.chooser(**_selection(config))
    if leaf not in (("kernel",) if config["target_modules"] == "all-linear" else holders) or not any(map(meant, names)):
        return array
    return _quantized(config, Target(module, axes, tuple(names), leaf), path, array)


def requantize(params: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[tree.Tree, dict[str, float]]:
    """Quantise the weights of a merged model again, as ``base`` has them, and measure the error.

    Args:
      params: plain parameters, such as ``method.merge(...)`` gives.
      base: the parameters before the merge, with quantised leaves.

    Returns the new tree and, for each quantised leaf by path, the root mean square of the error over that of the plain
    leaf. Codes can hold an adapter's update only where it is larger than their steps: look at the errors, and at the
    loss. Raises ``PeftJaxError`` where ``params`` lack a leaf, have it quantised or of another shape, or not finite.

    >>> base = quantize("int8").init(None, {"up_proj": {"kernel": jnp.eye(64)}})
    >>> requantize({"up_proj": {"kernel": jnp.eye(64)}}, base)[1]
    {'up_proj/kernel': 0.0}
    """
    arguments.check("requantize", {"params": params, "base": base})
    if not any(map(quant.is_leaf, tree.flatten(base).values())):
        raise PeftJaxError("requantize: base holds no quantised leaf: give first what was merged, then the quantised "
                           "parameters that the merge began with.")
    flat, errors = dict(tree.flatten(params)), {}
    for path, leaf in tree.flatten(base).items():
        if not quant.is_leaf(leaf):
            continue
        if path not in flat or quant.is_leaf(flat[path]):
            raise PeftJaxError(f"requantize: params have no plain '{path}': give what method.merge(params) returns.")
        plain = jnp.asarray(flat[path], jnp.float32)
        flat[path] = _encoded(path, flat[path], leaf.product, leaf.quant_type, block_size=leaf.block_size or None,
                              double_quant=leaf.double_quant, stack=leaf.stack, inputs=leaf.inputs,
                              outputs=leaf.outputs, by_rows=leaf.by_rows)
        error = jnp.square(quant.dequantize(flat[path], jnp.float32) - plain).mean()
        errors[path] = float(jnp.sqrt(error / jnp.square(plain).mean())) if error else 0.0  # of zeros it is 0, not 0/0
    return tree.unflatten(flat), errors


def _fold(params: Mapping[str, Any]) -> tree.Tree:
    return tree.map_paths(lambda path, leaf: quant.plain(leaf), params)


SHOWN = None  # not in tables and benchmarks: it trains nothing
