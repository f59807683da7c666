"""Bottleneck adapters: what Houlsby, Pfeiffer, parallel adapters and Compacter share, in the words of AdapterHub.

    f(u) = s * (act(u D + b_D) U + b_U)       after a module, h its output:    h + f(h)
                                              beside it, x its input:          h + f(x)

In each adapted module's own folder stand ``adapter_down`` (*stack, width, b), ``adapter_down_bias`` (*stack, b),
``adapter_up`` (*stack, b, width), ``adapter_up_bias`` (*stack, width) and the frozen ``adapter_scaling`` (*stack): s,
zero for layers of a stack that are not adapted. Options add ``adapter_scale`` (a learned factor of s) and
``adapter_norm_before`` and ``adapter_norm_after`` with their biases. No kernel is touched or read.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from peft_jax.core import targeting, tree, validation
from peft_jax.core.peft_format import Format, arguments_of
from peft_jax.core.remat import keep
from peft_jax.core.targeting import Patterns
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.bottleneck.placement import EXTRAS, SWITCH, Place, chosen, find, scalings, slots
from peft_jax.methods.lora.low_rank import scaled

ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False), "gelu_new": nn.gelu, "identity": lambda x: x,
    "leakyrelu": nn.leaky_relu, "relu": nn.relu, "sigmoid": nn.sigmoid, "silu": nn.silu, "swish": nn.silu,
    "tanh": jnp.tanh,
}  # fmt: skip
INITS = ("bert", "houlsby", "mam_adapter")
_EPSILON = 1e-5  # torch's LayerNorm


class Matrices(NamedTuple):
    """How the two matrices and their biases are kept, which is all that Compacter does otherwise.

    Fields:
      kind: ``peft_type``.
      keys: ``{leaf: ending of its tensors' keys in the file}``.
      start: ``(config, key, place) -> leaves`` of one module.
      read: ``(get, context) -> (down, down_bias, up, up_bias)`` float32; ``get(name)`` is the module's leaf,
        ``None`` where it has none.
      shared: ``(config, key) -> leaves`` at the root, which all modules share.
    """

    kind: str
    keys: Mapping[str, str]
    start: Callable[..., dict[str, jax.Array]]
    read: Callable[..., tuple]
    shared: Callable[..., dict[str, jax.Array]] = lambda config, key: {}


def bottleneck(mh_adapter: bool = True, output_adapter: bool = True, reduction_factor: float = 16.0,
               non_linearity: str = "gelu", *, bottleneck_size: int | None = None, is_parallel: bool = False,
               scaling: float | str = 1.0, original_ln_before: bool = False, ln_before: bool = False,
               ln_after: bool = False, init_weights: str | float = "bert", dropout: float = 0.0,
               leave_out: int | tuple[int, ...] = (), attention_modules: Patterns = ("self_attn",),
               output_modules: Patterns = ("mlp",),
               norm_modules: Patterns = ("input_layernorm", "post_attention_layernorm"),
               hidden_size: int | None = None, modules_to_save: tuple[str, ...] | None = None) -> Method:
    """A bottleneck adapter, with the arguments of AdapterHub's ``BnConfig``; the papers' are made from it.

    Args:
      mh_adapter, output_adapter: adapters at the attention's and at the feed-forward's output, before the residual
        addition.
      reduction_factor: width / bottleneck; bottleneck_size: the bottleneck itself, which then decides.
      non_linearity: one of ``ACTIVATIONS``; "gelu" is the exact one.
      is_parallel: the adapter takes the sublayer's input, not its output.
      scaling: s, or "learned" (one number a module) or "channel" (one a channel), which start at 1.
      original_ln_before: what u is. In a model whose norms come first, u of an adapter after a module is h (False) or
        h + the residual stream (True); u of an adapter beside a module (``is_parallel``) is the residual stream
        (False, as in AdapterHub) or the module's own input, the same stream normed (True). In a model whose norms come
        last, name the norms themselves as ``output_modules``: norm(v) becomes norm(v + f(v)) (False) or
        norm(v + f(norm(v))) (True).
      ln_before, ln_after: a new LayerNorm of u, of f(u). With ``ln_after`` training does not start from the base model,
        unless U is zero.
      init_weights: "bert" (deviation 0.02), "houlsby" (0.01, cut at two deviations), "mam_adapter" (D uniform within
        1/sqrt(width), U zero: exactly the base model at the start), or a deviation. Biases start at zero.
      dropout: probability that an element of f(u) is dropped; needs ``rngs={"dropout": key}``.
      leave_out: numbers of layers without an adapter.
      attention_modules, output_modules: names or endings, or a regex, of the modules that take an adapter. A module
        that both name counts as one of ``attention_modules``. Each must return an array, or a tuple that begins with
        one.
      norm_modules: whose input is the residual stream, of the sublayer that is called next.
      hidden_size: the width where it cannot be told from o_proj, down_proj, c_proj, out_proj, or an only kernel.
      modules_to_save: as of :func:`peft_jax.lora`.

    AdapterHub's ``original_ln_after`` and ``residual_before_ln`` have no counterpart: the places of the modules say the
    same. ``use_gating`` is left out: it averages over the sequence, so that a decoder's token would see what follows.

    >>> method = bottleneck(bottleneck_size=2, output_modules=("mlp",), mh_adapter=False)
    >>> params = method.init(jax.random.key(0), {"mlp": {"down_proj": {"kernel": jnp.ones((8, 6))}}})
    >>> {name: leaf.shape for name, leaf in params["mlp"].items() if name != "down_proj"}
    {'adapter_down': (6, 2), 'adapter_down_bias': (2,), 'adapter_up': (2, 6), 'adapter_up_bias': (6,), \
'adapter_scaling': ()}

    Raises ``PeftJaxError`` for values out of range, and from ``init`` for modules that are not there.
    """
    validation.check_switches({"is_parallel": is_parallel}, "is_parallel")
    if not isinstance(init_weights, str):
        validation.check_number("init_weights", init_weights)
    elif init_weights not in INITS:
        validation.check_choice("init_weights", init_weights, (*INITS, "a standard deviation"))
    return build(
        PLAIN, FORMAT, mh_adapter=mh_adapter, output_adapter=output_adapter, reduction_factor=reduction_factor,
        non_linearity=non_linearity, bottleneck_size=bottleneck_size, is_parallel=is_parallel, scaling=scaling,
        original_ln_before=original_ln_before, ln_before=ln_before, ln_after=ln_after, init_weights=init_weights,
        dropout=dropout, leave_out=leave_out, attention_modules=attention_modules, output_modules=output_modules,
        norm_modules=norm_modules, hidden_size=hidden_size, modules_to_save=modules_to_save)


def build(matrices: Matrices, stored: Format, **arguments: Any) -> Method:
    """The method of ``arguments``, checked here, whose matrices are kept as ``matrices``."""
    left, saved = arguments["leave_out"], arguments["modules_to_save"]
    left = (left,) if isinstance(left, int) else tuple(left or ())
    config = {"peft_type": matrices.kind, **arguments, "leave_out": left,
              "modules_to_save": validation.as_names(saved)}
    _check(config)
    shared = tuple(jax.eval_shape(lambda: matrices.shared(config, jax.random.key(0))))
    own = (*matrices.keys, *EXTRAS)
    trains = partial(kernel_adapter.trains, config, (*own, *shared), SWITCH)
    return Method(
        init=partial(_init, config, matrices, trains), intercept=partial(_intercept, config, matrices),
        labels=partial(kernel_adapter.labels, trained=trains), fold=None, config=config,
        padding=partial(kernel_adapter.padding, config=config, leaves=own, switch=SWITCH, chosen=chosen),
        stored=stored, leaves=(*own, SWITCH, *shared), vectors=tuple(EXTRAS))


def _check(config: Mapping[str, Any]) -> None:
    validation.check_switches(config, "mh_adapter", "output_adapter", "original_ln_before", "ln_before", "ln_after")
    if not (config["mh_adapter"] or config["output_adapter"]):
        raise PeftJaxError("mh_adapter and output_adapter are both False, which leaves no adapter: set one of them.")
    validation.check_choice("non_linearity", config["non_linearity"], tuple(ACTIVATIONS))
    validation.check_number("reduction_factor", config["reduction_factor"])
    if config["reduction_factor"] <= 0:
        raise PeftJaxError(f"reduction_factor={config['reduction_factor']!r}: give a number above 0.")
    if not all(isinstance(layer, int) for layer in config["leave_out"]):
        raise PeftJaxError(f"leave_out={config['leave_out']!r}: give the numbers of layers.")
    for name in ("bottleneck_size", "hidden_size"):
        if config[name] is not None:
            validation.check_whole(name, config[name])
    if config["scaling"] not in ("learned", "channel"):
        validation.check_number("scaling", config["scaling"])
    if config["scaling"] == 0:
        raise PeftJaxError("scaling=0 makes every adapter the base model and gives it no gradient: give another.")
    validation.check_probability("dropout", config["dropout"])
    for name in ("attention_modules", "output_modules", "norm_modules", "modules_to_save"):
        validation.check_modules(name, config[name])


def size(config: Mapping[str, Any], width: int) -> int:
    """The bottleneck's size, at least 1."""
    return config["bottleneck_size"] or max(1, int(width // config["reduction_factor"]))


def _init(config: Mapping[str, Any], matrices: Matrices, trains: kernel_adapter.Trains, rng: jax.Array,
          params: Mapping[str, Any], axes: Mapping[str, Any] | None = None) -> tree.Tree:
    flat = tree.flatten_arrays(params)
    if double := [path for path in flat if path.rpartition("/")[2] == SWITCH]:
        raise PeftJaxError(f"the parameters already hold bottleneck adapters ('{double[0]}'): one tree takes one "
                           "kind of them; start from the base's.")
    places = find(config, flat, axes)
    kernel_adapter.check_saved(config, params, places)
    for place in places:
        key = jax.random.fold_in(rng, zlib.crc32(place.path.encode()))
        flat |= {f"{place.path}/{name}": leaf for name, leaf in _leaves(config, matrices, key, place).items()}
    flat |= matrices.shared(config, jax.random.fold_in(rng, 1))
    return tree.unflatten({path: leaf.astype(jnp.float32) if trains(path, flat) else leaf
                           for path, leaf in flat.items()})


def _leaves(config: Mapping[str, Any], matrices: Matrices, key: jax.Array, place: Place) -> dict[str, jax.Array]:
    stack, width = place.stack, place.width
    new = matrices.start(config, key, place)
    shape = {"learned": (), "channel": (width,)}.get(config["scaling"])
    if shape is not None:
        new["adapter_scale"] = jnp.ones((*stack, *shape), jnp.float32)
    for name in [name for name in ("before", "after") if config[f"ln_{name}"]]:
        new[f"adapter_norm_{name}"] = jnp.ones((*stack, width), jnp.float32)
        new[f"adapter_norm_{name}_bias"] = jnp.zeros((*stack, width), jnp.float32)
    return {**new, SWITCH: jnp.asarray(scalings(config, place.names).reshape(stack))}


def _start(config: Mapping[str, Any], key: jax.Array, place: Place) -> dict[str, jax.Array]:
    narrow, how = size(config, place.width), config["init_weights"]
    shapes = [(*place.stack, place.width, narrow), (*place.stack, narrow, place.width)]
    down, up = (_random(how, k, shape) for k, shape in zip(jax.random.split(key), shapes))
    return {"adapter_down": down, "adapter_down_bias": jnp.zeros((*place.stack, narrow), jnp.float32),
            "adapter_up": jnp.zeros_like(up) if how == "mam_adapter" else up,
            "adapter_up_bias": jnp.zeros((*place.stack, place.width), jnp.float32)}


def _random(how: str | float, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if how == "mam_adapter":
        return jax.random.uniform(key, shape, jnp.float32, -1, 1) / math.sqrt(shape[-2])
    if how == "houlsby":
        return 0.01 * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)
    return (how if isinstance(how, float | int) else 0.02) * jax.random.normal(key, shape, jnp.float32)


def _read(get: Callable[[str], Any], context: Any) -> tuple:
    return get("adapter_down"), get("adapter_down_bias"), get("adapter_up"), get("adapter_up_bias")


def _intercept(config: Mapping[str, Any], matrices: Matrices, next_fun: Callable[..., Any], args: Any, kwargs: Any,
               context: Any) -> Any:
    module = context.module
    if context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    if targeting.listed(config["norm_modules"], ".".join(module.path)):
        context.notes["bottleneck", module.path[:-1]] = args[0]
    if not module.has_variable("params", SWITCH):
        return next_fun(*args, **kwargs)
    run, before = partial(_branch, config, matrices, context), config["original_ln_before"]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        v = args[0]
        return next_fun(v + run(_normed(module, v) if before else v, v.dtype), *args[1:], **kwargs)
    out = next_fun(*args, **kwargs)
    h = out[0] if isinstance(out, tuple) else out
    if config["is_parallel"]:
        u = args[0] if before else _residual(context)
    else:
        u = h + _residual(context) if before else h
    h = h + run(u, h.dtype)
    return (h, *out[1:]) if isinstance(out, tuple) else h


def _normed(module: Any, v: jax.Array) -> jax.Array:
    """The norm's output for ``v``, by a copy of it, since a module's own call may read its parameters only once; the
    copy is without the adapter's leaves, or it would be adapted again."""
    own = {name: leaf for name, leaf in module.variables["params"].items() if name in ("scale", "bias")}
    return module.clone(parent=None, name=None).apply({"params": own}, v)


def _residual(context: Any) -> jax.Array:
    """The residual stream in front of the sublayer: the input of the norm that was called last, in the folder around
    it."""
    path = context.module.path
    for depth in reversed(range(len(path))):
        if (noted := context.notes.get(("bottleneck", path[:depth]))) is not None:
            return noted
    raise PeftJaxError(f"'{'/'.join(path)}': no module of norm_modules was called before it, so that its adapter finds "
                       "no residual stream: name the norms, or change original_ln_before.")


def _branch(config: Mapping[str, Any], matrices: Matrices, context: Any, u: jax.Array, dtype: Any) -> jax.Array:
    """f(u) in ``dtype``; zero where the layer is not adapted."""
    module = context.module
    get = partial(_leaf, module)
    scaling = get(SWITCH)
    if scaling.ndim:
        raise PeftJaxError(f"'{'/'.join(module.path)}' is one module, which was taken for a stack of {scaling.size}: "
                           "give init axes=peft_jax.kernel_axes(model, params, *inputs).")
    parts: list[Any] = [None if one is None else one.astype(dtype) for one in matrices.read(get, context)]
    down, down_bias, up, up_bias = parts
    if u.shape[-1] != down.shape[0]:
        raise PeftJaxError(f"'{'/'.join(module.path)}' has {u.shape[-1]} channels, its adapter {down.shape[0]}: "
                           "give init the hidden_size.")
    flat = _norm(get, "adapter_norm_before", u).astype(dtype).reshape(-1, u.shape[-1])
    low = keep(_affine(flat, down, down_bias))
    f = _affine(ACTIVATIONS[config["non_linearity"]](low), up, up_bias).reshape(u.shape)
    scale = get("adapter_scale")
    f = scaled(f, scaling if scale is None else scaling * scale)
    f = _norm(get, "adapter_norm_after", kernel_adapter.dropped(module, context, f, config["dropout"], "dropout"))
    return jnp.where(scaling != 0, f, 0)


def _leaf(module: nn.Module, name: str) -> Any:
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def _affine(x: jax.Array, matrix: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x @ matrix if bias is None else x @ matrix + bias


def _norm(get: Callable[[str], Any], name: str, x: jax.Array) -> jax.Array:
    """LayerNorm in float32 where the leaf is there, else ``x``."""
    if (scale := get(name)) is None:
        return x
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + _EPSILON)
    return (unit * scale + get(f"{name}_bias")).astype(x.dtype)


KEYS = {"adapter_down": "adapter_down.weight", "adapter_down_bias": "adapter_down.bias",
        "adapter_up": "adapter_up.weight", "adapter_up_bias": "adapter_up.bias"}
PLAIN = Matrices(kind="BOTTLENECK", keys=KEYS, start=_start, read=_read)
FORMAT = Format(kind="BOTTLENECK", make=bottleneck, arguments=arguments_of(bottleneck), slots=partial(slots, KEYS))
SHOWN = None  # not in tables and benchmarks: what is made from it is
