"""LoRA, low-rank adaptation (arXiv 2106.09685, eq. 3), with rank-stabilised scaling (arXiv 2312.03732).

    y = x W + s (drop(x) A) B        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

W (in, out) is frozen, A (in, r) starts random and B (r, out) at zero, so that training starts from the base model.
Beside each adapted ``kernel`` stand ``lora_a`` (*stack, *in, r), ``lora_b`` (*stack, r, *out) and the frozen
``lora_scaling`` (*stack): one s for each layer of a scanned stack. Layers of a stack with a smaller rank, or with none,
are filled with zeros on both sides of the product, which stay zero under any gradient step.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.lax import optimization_barrier as barrier

from peft_jax import targets, tree
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.kept import keep
from peft_jax.method import FROZEN, TRAINABLE, Method
from peft_jax.targets import Patterns

LEAVES = ("lora_a", "lora_b", "lora_scaling")
BIASES = ("none", "all", "lora_only")
INITS = (True, False, "gaussian")


def lora(r: int = 8, lora_alpha: float = 8, target_modules: Patterns = ("q_proj", "v_proj"), lora_dropout: float = 0.0,
         *, exclude_modules: Patterns = None, layers_to_transform: int | tuple[int, ...] | None = None,
         layers_pattern: Patterns = None, rank_pattern: Mapping[str, int] | None = None,
         alpha_pattern: Mapping[str, float] | None = None, use_rslora: bool = False, bias: str = "none",
         modules_to_save: tuple[str, ...] | None = None, init_lora_weights: bool | str = True) -> Method:
    """LoRA with the arguments, meanings and defaults of Hugging Face peft's ``LoraConfig``.

    Args:
      r: rank of the update. lora_alpha: numerator of the scale.
      target_modules: a list of module names or their endings, a regex for whole names, or ``"all-linear"`` (every
        kernel but the output head). peft's ``None`` is its default for the model's family; here that is q and v.
      lora_dropout: probability that an input element of the branch is dropped; needs ``rngs={"dropout": key}``.
      exclude_modules: as target_modules, taken out again.
      layers_to_transform: layer numbers; layers_pattern: the word in front of the number, any where absent.
      rank_pattern, alpha_pattern: ``{regex for the end of a name: value}``, exceptions from r and lora_alpha.
      bias: which biases train: "none", "all", "lora_only" (of adapted modules).
      modules_to_save: endings of names of modules that train as a whole. On a model whose head is tied,
        "embed_tokens" keeps the tie (peft's ensure_weight_tying); after ``peft_jax.untie`` it does not (peft's
        default).
      init_lora_weights: True for A uniform within 1/sqrt(in), "gaussian" for A normal with deviation 1/r, False for A
        and B both uniform (not the base model at the start; for tests).

    Returns a :class:`Method`. Leaves are float32 whatever the base's dtype; the branch computes in the module's.

    >>> method = lora(r=4, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items()}
    {'kernel': (6, 8), 'lora_a': (6, 4), 'lora_b': (4, 8), 'lora_scaling': ()}

    Raises ``PeftJaxError`` for values out of range, and from ``init`` for patterns that match nothing.
    """
    config = {"peft_type": "LORA", **locals()}
    config["target_modules"] = ("q_proj", "v_proj") if target_modules is None else target_modules
    config["modules_to_save"] = (modules_to_save,) if isinstance(modules_to_save, str) else modules_to_save
    _check(config)
    return Method(partial(_init, config), partial(_intercept, lora_dropout), partial(_labels, config), _merge, config,
                  partial(_padding, config))


def _check(config: dict[str, Any]) -> None:
    _check_types(config)
    ranks = {"r": config["r"], **{f"rank_pattern['{k}']": v for k, v in (config["rank_pattern"] or {}).items()}}
    for name, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PeftJaxError(f"{name}={value!r}: a rank is a whole number of at least 1.")
    if not 0 <= config["lora_dropout"] < 1:
        raise PeftJaxError(f"lora_dropout={config['lora_dropout']!r}: a probability of at least 0 and below 1.")
    for name, choices in {"bias": BIASES, "init_lora_weights": INITS}.items():
        if config[name] not in choices:
            raise PeftJaxError(f"{name}={config[name]!r}: {nearest(config[name], map(str, choices))}")
    if isinstance(config["target_modules"], str) and config["layers_to_transform"] not in (None, (), []):
        raise PeftJaxError(f"layers_to_transform needs target_modules as a list of names, as in peft; it is the string "
                           f"{config['target_modules']!r}: name the modules, or put the layers into the regex.")
    _check_regexes(config)


def _check_types(config) -> None:
    words = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
    for name, kind in {**dict.fromkeys(words, str), "layers_to_transform": int}.items():
        given = config[name] if isinstance(config[name], list | tuple) else (config[name],)
        if not all(one is None or isinstance(one, kind) for one in given):
            raise PeftJaxError(f"{name}={config[name]!r}: give {'names' if kind is str else 'whole numbers'} or None.")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config[name], Mapping | None):
            raise PeftJaxError(f"{name}={config[name]!r}: give a dict, such as {{'layers.0.self_attn.q_proj': 4}}.")
    alphas = {f"alpha_pattern['{key}']": value for key, value in (config["alpha_pattern"] or {}).items()}
    for name, value in {"lora_alpha": config["lora_alpha"], "lora_dropout": config["lora_dropout"], **alphas}.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise PeftJaxError(f"{name}={value!r}: give a finite number.")


def _check_regexes(config) -> None:
    given = [config[name] for name in ("target_modules", "exclude_modules") if isinstance(config[name], str)]
    for regex in (*given, *(config["rank_pattern"] or ()), *(config["alpha_pattern"] or ())):
        try:
            re.compile(regex)
        except re.error as error:
            raise PeftJaxError(f"'{regex}' is no regular expression: {error}.") from error


def selection(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say which modules are adapted."""
    chosen = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    return {name: config[name] for name in chosen}


def ranks(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The rank of each module by its name, int (len(names),), 0 where it is not adapted."""
    chosen = targets.chooser(**selection(config))
    return np.array([targets.pattern_value(config["rank_pattern"], name, config["r"]) if chosen(name) else 0
                     for name in names])


def scalings(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The scale of each module by its name, float32 (len(names),), 0 where it is not adapted."""
    alphas = np.array([targets.pattern_value(config["alpha_pattern"], name, config["lora_alpha"]) for name in names])
    rank = ranks(config, names)
    divisor = np.maximum(np.sqrt(rank) if config["use_rslora"] else rank, 1)
    return np.where(rank > 0, alphas / divisor, 0).astype(np.float32)


def _init(config, rng, params, axes=None):
    if held := _adapted(flat := tree.flatten(params)):
        raise PeftJaxError(f"the parameters already hold LoRA ('{held[0]}lora_a'): start from the base's, "
                           "or merge first.")
    found = targets.find(params, axes, selection(config))
    _check_saved(config, params, found)
    _check_biases(config, flat, found)
    for target in found:
        key = jax.random.fold_in(rng, zlib.crc32(target.path.encode()))  # by path: other targets change nothing here
        flat |= {f"{target.path}/{name}".lstrip("/"): leaf for name, leaf in _leaves(config, key, target).items()}
    return tree.unflatten({path: leaf.astype(jnp.float32) if _trains(config, path, flat) else leaf
                           for path, leaf in flat.items()})  # a bfloat16 leaf would lose most of an update


def _leaves(config, key, target) -> dict[str, jax.Array]:
    _, stack, inputs, outputs = target.axes
    each = ranks(config, target.names).reshape(*stack, 1, 1)
    width, most, how = math.prod(inputs), each.max(), config["init_lora_weights"]
    own = np.maximum(each, 1)  # 0 is a layer without an update; nothing of it is kept
    a = _uniform(key, (*stack, width, most), 1 / math.sqrt(width))
    if how == "gaussian":
        a = jax.random.normal(key, a.shape, jnp.float32) * (1 / own).astype(np.float32)
    bound = 1 / np.sqrt(own) if how is False else 0
    b = _uniform(jax.random.fold_in(key, 1), (*stack, most, math.prod(outputs)), bound)
    a = jnp.where(np.arange(most) < each, a, 0)
    b = jnp.where(np.arange(most)[:, None] < each, b, 0)
    scaling = jnp.asarray(scalings(config, target.names).reshape(stack))
    return {"lora_a": a.reshape(*stack, *inputs, most), "lora_b": b.reshape(*stack, most, *outputs),
            "lora_scaling": scaling}


def _uniform(key, shape, bound):
    return jax.random.uniform(key, shape, jnp.float32, -1, 1) * np.float32(bound)


def _check_saved(config, params, found) -> None:
    names = [path.replace("/", ".") for path in tree.flatten(params)]
    both = [target.path for target in found if targets.saved(config["modules_to_save"], target.path.replace("/", "."))]
    if both:
        raise PeftJaxError(f"'{both[0]}' is both adapted and, by the ending of its name, in modules_to_save "
                           f"({', '.join(config['modules_to_save'])}): spell out the names of one or the other.")
    for module in config["modules_to_save"] or ():
        if not any(targets.saved((module,), name.rpartition(".")[0]) for name in names):
            hint = (" The head is tied to the embedding: untie it first with peft_jax.untie(params)."
                    if module == "lm_head" else "")
            raise PeftJaxError(f"modules_to_save has '{module}', which is no module of this model: "
                               f"{nearest(module, {p for n in names for p in n.split('.')[:-1]})}.{hint}")


def _check_biases(config, flat, found) -> None:
    """A stacked bias leaf trains as a whole; peft's lora_only on some layers of a stack would need a part of it."""
    partly = [t.path for t in found if not ranks(config, t.names).all() and f"{t.path}/bias" in flat]
    if config["bias"] == "lora_only" and partly:
        raise PeftJaxError(f"bias='lora_only' on some layers of a scanned stack ('{partly[0]}/bias') is not supported: "
                           "adapt all layers, or set bias to 'none' or 'all'.")


def _intercept(dropout, next_fun, args, kwargs, context):
    module = context.module
    y = next_fun(*args, **kwargs)
    if context.method_name != "__call__" or not module.has_variable("params", "lora_a"):
        return y
    a, b, scaling = (module.get_variable("params", name) for name in LEAVES)
    axis = _input_axes(module, args[0].ndim)
    if scaling.ndim:  # else the products below could fit by accident
        raise PeftJaxError(f"'{'/'.join(module.path)}' has one kernel, which was taken for a stack of {scaling.size}: "
                           "give init axes=peft_jax.kernel_axes(model, params, *inputs).")
    x = jnp.moveaxis(args[0], axis, range(-len(axis), 0))
    if dropout and "dropout" in context.rngs:
        if not module.has_rng("dropout"):
            raise PeftJaxError(f"lora_dropout={dropout} cannot draw in '{'/'.join(module.path)}': the nn.scan around "
                               "it withholds the stream; give it split_rngs={'params': True, 'dropout': True}.")
        drop = nn.Dropout(dropout, deterministic=False, parent=None)
        x = drop.apply({}, x, rngs={"dropout": module.make_rng("dropout")})
    return y + branch(x.astype(y.dtype), a, b, scaling).reshape(y.shape)


def _input_axes(module, ndim) -> tuple[int, ...]:
    if not isinstance(module, (nn.Dense, nn.DenseGeneral)):
        raise PeftJaxError(f"'{'/'.join(module.path)}' is a {type(module).__name__}: LoRA changes Dense and "
                           "DenseGeneral modules only.")
    axis = getattr(module, "axis", -1)
    return tuple(i % ndim for i in (axis if isinstance(axis, (tuple, list)) else (axis,)))


def branch(x, a, b, scaling):
    """s (x A) B for x (..., *in), a (*in, r), b (r, *out): (tokens, prod(out)) in x's dtype.

    Reverse-mode differentiable only, see ``_product``.
    """
    rank = a.shape[-1]
    a, b = a.astype(x.dtype).reshape(-1, rank), b.astype(x.dtype).reshape(rank, -1)
    return _product(x.reshape(-1, a.shape[0]), a, b, scaling.astype(x.dtype))


@jax.custom_vjp
def _product(x, a, b, s):
    """s (x A) B for x (tokens, in): differentiated by hand, since XLA on a CPU is up to eight times slower at a tall,
    thin gradient of A, (in, r), than at its transpose (LOG.md, 2026-11-24); the barriers keep it from swapping back.
    """
    return (x @ a * s) @ b


def _product_forward(x, a, b, s):
    low = keep(x @ a)
    return (low * s) @ b, (x, a, b, s, low)


def _product_backward(kept, gradient):
    x, a, b, s, low = kept
    back = gradient @ b.T
    by_a = barrier(barrier((back * s).T) @ x).T
    by_b = barrier((low * s).T) @ gradient
    return (back * s) @ a.T, by_a, by_b, jnp.vdot(low, back)


_product.defvjp(_product_forward, _product_backward)


def _labels(config, params):
    flat = tree.flatten(params)
    return tree.unflatten({path: TRAINABLE if _trains(config, path, flat) else FROZEN for path in flat})


def _trains(config, path, flat) -> bool:
    folder, _, name = path.rpartition("/")
    if name in LEAVES:
        return name != "lora_scaling"
    if name == "bias" and (config["bias"] == "all" or (config["bias"] == "lora_only" and f"{folder}/lora_a" in flat)):
        return True
    return targets.saved(config["modules_to_save"], folder.replace("/", "."))


def _merge(params):
    """Fold s A B into each kernel, in float32, back to the kernel's dtype; the LoRA leaves are gone afterwards."""
    flat = tree.flatten(params)
    for folder in _adapted(flat):
        a, b, scaling = (flat.pop(folder + name) for name in LEAVES)
        kernel = flat[folder + "kernel"]
        flat[folder + "kernel"] = (kernel.astype(jnp.float32) + delta(a, b, scaling)).astype(kernel.dtype)
    return tree.unflatten(flat)


def _adapted(flat) -> list[str]:
    """The folders, with a slash at the end, of all modules that hold LoRA."""
    return [path.removesuffix("lora_a") for path in flat if path.endswith("lora_a")]


def delta(a, b, scaling):
    """The update s A B, float32 (*stack, *in, *out), of the leaves of one module."""
    stack, rank = scaling.shape, a.shape[-1]
    product = jnp.matmul(a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1), precision="highest")
    return (product * scaling[..., None, None]).reshape(*a.shape[:-1], *b.shape[len(stack) + 1:])


def _padding(config, params) -> int:
    """Elements of A and B beyond each layer's own rank."""
    flat = tree.flatten(params)
    unused = 0
    for folder in _adapted(flat):
        a, b = flat[folder + "lora_a"], flat[folder + "lora_b"]
        held = ranks(config, targets.module_names(folder.rstrip("/"), flat[folder + "lora_scaling"].shape))
        width = (a.size + b.size) // (a.shape[-1] * len(held))  # of one rank in one layer
        unused += width * int((a.shape[-1] - held).sum())
    return unused
