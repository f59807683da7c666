"""Prefix tuning (arXiv 2101.00190): n trained keys and values in front of those of every layer.

    attention(q, [P_k, K], [P_v, V])        P_k, P_v (n, kv heads, head size) of each layer, keys after rotary

At the attention's ``core``, ``layers/self_attn/core`` in a Llama, stands ``prefix`` (layers, n, 2, kv heads * head
size), in encoders too; peft has it for BERT and RoBERTa and refuses DistilBERT. With ``prefix_projection`` a network
makes it, as in the paper, P = W tanh(V e + c) + b: ``prefix_encoder`` at the root holds e, V and c, which all layers
share, ``core/prefix_out`` and ``core/prefix_bias`` hold each layer's part of W and b. The network is there for training
only: a saved adapter holds P, and loads as the plain leaf.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import arguments, targeting, tree, validation
from peft_jax.core.peft_format import Format, Naming, Slot
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods.soft_prompt import virtual_tokens
from peft_jax.models import masks

# The kernel that makes the keys, beside the attention's core, by its name: how many parts its output has.
KEYS = {"k_proj": 1, "c_attn": 3, "key": 1, "k_lin": 1}


def prefix(num_virtual_tokens: int = 20, *, token_dim: int | None = None, num_layers: int | None = None,
           num_attention_heads: int | None = None, prefix_projection: bool = False,
           encoder_hidden_size: int | None = None, init_weights: str | None = None, init_std: float = 0.01,
           shift_positions: bool = True, prefix_init_ids: Sequence[int] | None = None,
           modules_to_save: targeting.Patterns = None) -> Method:
    """Prefix tuning with the names and meanings of Hugging Face peft's ``PrefixTuningConfig``.

    Args:
      num_virtual_tokens: n.
      token_dim, num_layers, num_attention_heads: kv heads * head size, layers and kv heads of the model. ``None`` takes
        what it has; given, as a saved adapter gives them, they must agree with it.
      prefix_projection: train the network instead; encoder_hidden_size: its units, ``None`` is token_dim.
      init_weights: "zero", or ``None`` for normal numbers of deviation ``init_std`` (peft's is 1); with the projection
        "zero" is W and b.
      shift_positions: True as in peft: real tokens take the positions from n on, and in layers with a window the prefix
        slides out of sight as the first n tokens would. False: positions from 0, the prefix always in sight; peft has
        no such adapter, and refuses the file.
      prefix_init_ids: start from the keys and values of a text, see :func:`prefix_from_ids`: its token ids, cut or
        repeated to n. ``method.prepare(model, base params, ())`` runs them through the model and gives the method to
        init.
      modules_to_save: modules that train as a whole, such as a "classifier", which peft needs to read its adapter.

    Returns a :class:`Method` for a model of :mod:`peft_jax.models`; its leaves are float32. It cannot be merged, and
    even a zero prefix is not the base model: it takes a share of the attention.

    >>> kernel = jnp.ones((3, 8, 4))  # three layers, two kv heads of two
    >>> base = {"layers": {"self_attn": {"k_proj": {"kernel": kernel}, "v_proj": {"kernel": kernel}}}}
    >>> prefix(5).init(jax.random.key(0), base)["layers"]["self_attn"]["core"]["prefix"].shape
    (3, 5, 2, 4)

    Raises ``PeftJaxError`` for arguments of the wrong type, and from ``init`` for a model of another kind or size.
    """
    config = virtual_tokens.tidy(
        peft_type="PREFIX_TUNING" if shift_positions else UNSHIFTED, num_virtual_tokens=num_virtual_tokens,
        token_dim=token_dim, num_layers=num_layers, num_attention_heads=num_attention_heads,
        prefix_projection=prefix_projection, encoder_hidden_size=encoder_hidden_size, init_weights=init_weights,
        init_std=init_std, shift_positions=shift_positions, prefix_init_ids=prefix_init_ids,
        modules_to_save=modules_to_save)
    _check(config)
    return Method(
        init=partial(_init, config), intercept=partial(_intercept, config),
        labels=partial(virtual_tokens.labels, config), fold=None, config=config,
        stored=FORMAT if shift_positions else FORMAT_UNSHIFTED, leaves=virtual_tokens.LEAVES,
        vectors=("b",), prepare=None if prefix_init_ids is None else partial(_prepare, config))


def _check(config: Mapping[str, Any]) -> None:
    for name in ("token_dim", "num_layers", "num_attention_heads", "encoder_hidden_size"):
        validation.check_whole(name, 1 if config[name] is None else config[name])
    validation.check_choice("init_weights", config["init_weights"], (None, "zero"))
    validation.check_switches(config, "prefix_projection", "shift_positions")
    validation.check_number("init_std", config["init_std"])
    validation.check_ids("prefix_init_ids", config["prefix_init_ids"])
    if config["prefix_init_ids"] is not None and (config["prefix_projection"] or config["init_weights"]):
        raise PeftJaxError("prefix_init_ids starts from keys and values of a text: leave out prefix_projection, whose "
                           "network cannot be made to give chosen keys, and init_weights.")


def _init(config: Mapping[str, Any], rng: jax.Array, params: Mapping[str, Any], axes: Any = None, *,
          start: jax.Array | None = None) -> tree.Tree:
    """``start``: keys and values to start from."""
    flat = virtual_tokens.start(config, params, "prefix tuning")
    folder, layers, width = _attention(flat)
    for name, own in (("num_layers", layers), ("token_dim", width)):
        if config[name] not in (None, own):
            raise PeftJaxError(f"{name}={config[name]}, but this model has {own} (in '{folder.rstrip('/')}'): a prefix "
                               "fits the model that it was made for.")
    if config["prefix_init_ids"] is not None and start is None:
        raise PeftJaxError("prefix_init_ids needs the model to make keys of a text: init what method.prepare(model, "
                           "params, ()) gives instead.")
    core, n = f"{folder}core/", config["num_virtual_tokens"]
    if config["prefix_projection"]:
        return tree.unflatten(flat | _projection(config, rng, core, layers, width))
    std = 0 if config["init_weights"] == "zero" else config["init_std"]
    flat[f"{core}prefix"] = std * jax.random.normal(rng, (layers, n, 2, width), jnp.float32) if start is None else start
    return tree.unflatten(flat)


def _prepare(config: Mapping[str, Any], model: Any, params: Mapping[str, Any], batches: Any) -> Method:
    """The method that starts from the keys and values of its text."""
    arguments = {name: value for name, value in config.items() if name != "peft_type"}
    plain = prefix(**{**arguments, "prefix_init_ids": None})
    ids = np.resize(np.asarray(config["prefix_init_ids"]), config["num_virtual_tokens"])
    made = tree.flatten(prefix_from_ids(plain, model, plain.init(jax.random.key(0), params), ids))
    start = made[f"{_attention(made)[0]}core/prefix"]
    return prefix(**arguments)._replace(init=partial(_init, config, start=start), prepare=None)


def _attention(flat: Mapping[str, Any]) -> tuple[str, int, int]:
    """(folder of the attention with a slash at the end, layers, kv heads * head size)."""
    paths = [path for path in flat if re.fullmatch(rf"(.*/)?({'|'.join(KEYS)})/kernel", path)]
    if len(paths) != 1 or len(flat[paths[0]].shape) != 3:
        raise PeftJaxError(f"the parameters have {len(paths)} kernels that make keys ({', '.join(KEYS)}), and prefix "
                           "tuning needs one (layers, in, out), of a scanned model as in peft_jax.models.")
    folder, name, _ = f"/{paths[0]}".rsplit("/", 2)
    return f"{folder}/".lstrip("/"), flat[paths[0]].shape[0], flat[paths[0]].shape[2] // KEYS[name]


def _projection(config: Mapping[str, Any], rng: jax.Array, core: str, layers: int, width: int) -> dict[str, jax.Array]:
    """The network's leaves, each starting as in torch."""
    n, units = config["num_virtual_tokens"], config["encoder_hidden_size"] or width
    keys = jax.random.split(rng, 5)
    inner, outer = 1 / math.sqrt(width), 0 if config["init_weights"] == "zero" else 1 / math.sqrt(units)
    return {"prefix_encoder/tokens": jax.random.normal(keys[0], (n, width), jnp.float32),
            "prefix_encoder/w": jax.random.uniform(keys[1], (width, units), jnp.float32, -inner, inner),
            "prefix_encoder/b": jax.random.uniform(keys[2], (units,), jnp.float32, -inner, inner),
            f"{core}prefix_out": jax.random.uniform(keys[3], (layers, units, 2 * width), jnp.float32, -outer, outer),
            f"{core}prefix_bias": jax.random.uniform(keys[4], (layers, 2 * width), jnp.float32, -outer, outer)}


def _projected(encoder: Mapping[str, jax.Array], out: jax.Array, bias: jax.Array) -> jax.Array:
    """(..., n, 2, width) for ``out`` (..., units, 2 * width) and ``bias`` (..., 2 * width)."""
    states = jnp.tanh(encoder["tokens"] @ encoder["w"] + encoder["b"])
    made = states @ out + bias[..., None, :]
    return made.reshape(*made.shape[:-1], 2, -1)


def _intercept(config: Mapping[str, Any], next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any,
               ) -> Any:
    if context.method_name == "__call__":
        own = _own(context)
        return next_fun(*args, **kwargs) if own is None else _attend(config, own, context, next_fun, *args, **kwargs)
    hook = HOOKS.get(context.method_name)
    if hook is None or not (n := _count(context.params)):
        return next_fun(*args, **kwargs)
    return hook(n, config["shift_positions"], context.module, next_fun, *args, **kwargs)


def _own(context: Any) -> jax.Array | None:
    """This layer's prefix (n, 2, width), in an attention core alone."""
    module = context.module
    if module.has_variable("params", "prefix"):
        return module.get_variable("params", "prefix")
    if module.has_variable("params", "prefix_out"):
        return _projected(context.params["prefix_encoder"], module.get_variable("params", "prefix_out"),
                          module.get_variable("params", "prefix_bias"))
    return None


def _attend(config: Mapping[str, Any], own: jax.Array, context: Any, next_fun: Callable[..., Any], query: jax.Array,
            key: jax.Array, value: jax.Array, mask: Any) -> Any:
    n, where = own.shape[0], "/".join(context.module.path)
    heads, size = key.shape[2:]
    if own.shape[1:] != (2, heads * size) or config["num_attention_heads"] not in (None, heads):
        raise PeftJaxError(f"'{where}' has {heads} kv heads of {size}, the prefix is {own.shape} for "
                           f"num_attention_heads={config['num_attention_heads']}: it is another model's.")
    if masks.keys(mask) != n + key.shape[1]:
        raise PeftJaxError(f"'{where}' gets a mask for {masks.keys(mask)} keys, {n} virtual and {key.shape[1]} others: "
                           "prefix tuning needs a model whose masks pass through its method visible().")
    front = jnp.broadcast_to(own.reshape(1, n, 2, heads, size), (key.shape[0], n, 2, heads, size))
    key, value = (jnp.concatenate([front[:, :, i].astype(x.dtype), x], axis=1) for i, x in enumerate((key, value)))
    return next_fun(query, key, value, mask)


def _count(params: Mapping[str, Any]) -> int:
    """How many virtual tokens the whole tree holds."""
    flat = tree.flatten(params)
    if "prefix_encoder/tokens" in flat:
        return flat["prefix_encoder/tokens"].shape[0]
    return next((leaf.shape[1] for path, leaf in flat.items() if path.endswith("core/prefix")), 0)


def _place(n: int, shifted: bool, module: Any, next_fun: Callable[..., Any], positions: Any) -> Any:
    return next_fun(positions) + (n if shifted else 0)


def _check_length(n: int, shifted: bool, module: Any, next_fun: Callable[..., Any], tokens: int) -> Any:
    virtual_tokens.check_room(module, tokens, n if shifted else 0)
    return next_fun(tokens)


def _visible(n: int, shifted: bool, module: Any, next_fun: Callable[..., Any], key_mask: Any, positions: Any,
             index: Any, rows: Any) -> tuple:
    """The masks with n keys more in front, which every query sees, or in a window those near enough."""
    both = next_fun(key_mask, positions, index, rows)
    words = key_mask is None and not rows.packed and (both[1] is None or shifted)
    full, windowed = (masks.behind(mask, n, None if words else positions.shape) for mask in both)
    if windowed is not None and shifted and not words:
        near = positions[:, None, :, None] + n - jnp.arange(n) < module.config.sliding_window
        windowed = windowed.at[..., :n].set(near)
    return full, windowed


def _init_cache(n: int, shifted: bool, module: Any, next_fun: Callable[..., Any], batch: int, length: int) -> Any:
    """The cache holds no prefix, which every step puts in front anew, but it takes positions."""
    virtual_tokens.check_room(module, length, n if shifted else 0)
    return next_fun(batch, length)


HOOKS = {"place": _place, "visible": _visible, "init_cache": _init_cache, "check_length": _check_length}


def prefix_from_ids(method: Method, model: Any, params: Mapping[str, Any], input_ids: Any) -> tree.Tree:
    """``params`` with the keys and values of a text as their prefix: at first the model behaves as behind that text.

    Args:
      method, params: a ``prefix(...)`` without projection, and what its ``init`` gave.
      model: the plain model, with a cache.
      input_ids: the text, int (num_virtual_tokens,).

    Raises ``PeftJaxError`` for a projection, another number of tokens, ids beyond the vocabulary, an encoder, and for
    learned positions, of which there are none before the first, without ``shift_positions``.
    """
    arguments.check("prefix_from_ids", {"method": method, "model": model, "params": params})
    if not method.config["peft_type"].startswith("PREFIX"):
        raise PeftJaxError(f"prefix_from_ids: the method is {method.config['peft_type']}: give prefix(...).")
    flat, ids, shifted = tree.flatten(params), jnp.asarray(input_ids), method.config["shift_positions"]
    path = f"{_attention(flat)[0]}core/prefix"
    if path not in flat:
        raise PeftJaxError(f"prefix_from_ids: the parameters have no '{path}': init them by prefix(...), without "
                           "prefix_projection, whose network cannot be made to give chosen keys.")
    layers, n, _, width = flat[path].shape
    if ids.shape != (n,):
        raise PeftJaxError(f"prefix_from_ids: input_ids are {ids.shape}, the prefix has {n} virtual tokens: give as "
                           "many ids, or that num_virtual_tokens.")
    if virtual_tokens.is_encoder(model) or not (shifted or _rotates(flat)):
        raise PeftJaxError("prefix_from_ids: keys of a text can be had from a decoder, with shift_positions=False from "
                           "one with rotary positions only: leave it out, or take another start.")
    virtual_tokens.check_vocabulary("the text of a prefix", ids, flat)
    positions = jnp.arange(n) - (0 if shifted else n)
    _, made = model.apply({"params": params, "cache": model.init_cache(1, n)}, ids[None], positions=positions[None],
                          method="hidden", mutable=["cache"])
    slots = tree.flatten(made["cache"])
    parts = [slots[path.replace("core/prefix", name)].reshape(layers, n, width) for name in ("key", "value")]
    return tree.unflatten({**flat, path: jnp.stack(parts, axis=2).astype(jnp.float32)})


def _rotates(flat: Mapping[str, Any]) -> bool:
    """Whether there are positions below 0, which no table of learned ones holds."""
    return not any(re.fullmatch(r"(.*/)?(wpe|position_embeddings)/embedding", path) for path in flat)


def _plain(config: Mapping[str, Any], flat: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The network's output in its place."""
    core = f"{_attention(flat)[0]}core/"
    if f"{core}prefix" in flat:
        return config, flat
    encoder = {name: jnp.asarray(flat[f"prefix_encoder/{name}"]) for name in ("tokens", "w", "b")}
    made = _projected(encoder, *(jnp.asarray(flat[f"{core}prefix_{name}"]) for name in ("out", "bias")))
    rest = {path: leaf for path, leaf in flat.items() if not virtual_tokens.OWN.fullmatch(path)}
    return {**config, "prefix_projection": False}, {**rest, f"{core}prefix": np.asarray(made)}


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    """peft holds (n, layers * 2 * width): of each token every layer's key and value."""
    path = f"{_attention(flat)[0]}core/prefix"
    layers, n, _, width = flat[path].shape
    slot = Slot(path, lambda leaf: leaf.transpose(1, 0, 2, 3), (n, layers * 2 * width))
    return virtual_tokens.slots(path, slot, config, trained, naming, n)


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """Without the heads peft takes both sizes from the model: it would take token_dim alone for the hidden size."""
    _, layers, width = _attention(flat)
    return {"num_transformer_submodules": 1, "num_layers": layers,
            "token_dim": width if config["num_attention_heads"] else None}


UNSHIFTED = "PREFIX_TUNING_UNSHIFTED"
ARGUMENTS = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
             "modules_to_save")
SILENT = ("prefix_projection", "encoder_hidden_size", "init_weights")  # of a saved adapter only the output is left
FORMAT = Format(kind="PREFIX_TUNING", make=prefix, arguments=ARGUMENTS, slots=_slots, fields=_fields, silent=SILENT,
                read=virtual_tokens.read, plain=_plain)
# Under a name of its own, so that peft refuses it and does not read it as a shifted one.
FORMAT_UNSHIFTED = FORMAT._replace(kind=UNSHIFTED, make=partial(prefix, shift_positions=False))
FORMATS = (FORMAT, FORMAT_UNSHIFTED)
