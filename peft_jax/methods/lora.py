"""LoRA, low-rank adaptation (arXiv 2106.09685, eq. 3), with rank-stabilised scaling (arXiv 2312.03732).

    y = x W + s (drop(x) A) B        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

W (in, out) is frozen, A (in, r) starts random and B (r, out) at zero, so that training starts from the base model.
Beside each adapted ``kernel`` stand ``lora_a`` (*stack, *in, r), ``lora_b`` (*stack, r, *out) and the frozen
``lora_scaling`` (*stack): one s for each layer of a scanned stack. Layers of a stack with a smaller rank, or with none,
are filled with zeros on both sides of the product, which stay zero under any gradient step.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import optimization_barrier as barrier

from peft_jax import beside, targets, tree
from peft_jax.errors import PeftJaxError
from peft_jax.kept import keep
from peft_jax.method import Method
from peft_jax.methods import biases
from peft_jax.stored import Format, Naming, Slot
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
    config = beside.tidy({"peft_type": "LORA", **locals()})
    _check(config)
    return Method(partial(_init, config), partial(_intercept, lora_dropout), partial(labels, config), _merge, config,
                  partial(padding, config), FORMAT)


def _check(config: Mapping[str, Any]) -> None:
    beside.check_patterns(config, "r", "lora_alpha")
    beside.check_probability("lora_dropout", config["lora_dropout"])
    beside.check_choice("bias", config["bias"], BIASES)
    beside.check_choice("init_lora_weights", config["init_lora_weights"], INITS)


def ranks(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The rank of each module by its name, int (len(names),), 0 where it is not adapted."""
    return np.array([targets.pattern_value(config["rank_pattern"], name, config["r"]) if chosen else 0
                     for name, chosen in zip(names, beside.chosen(config, names))], int)


def scalings(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The scale of each module by its name, float32 (len(names),), 0 where it is not adapted."""
    alphas = np.array([targets.pattern_value(config["alpha_pattern"], name, config["lora_alpha"]) for name in names])
    rank = ranks(config, names)
    divisor = np.maximum(np.sqrt(rank) if config["use_rslora"] else rank, 1)
    return np.where(rank > 0, alphas / divisor, 0).astype(np.float32)


def _init(config, rng, params, axes=None):
    params = beside.init(config, rng, params, axes, partial(leaves, config), partial(trains, config))
    biases.check(config, tree.flatten(params), "lora_scaling")
    return params


def leaves(config, key, target, kernel) -> dict[str, jax.Array]:
    """``lora_a``, ``lora_b`` and ``lora_scaling`` of one target."""
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


def _intercept(dropout, next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    held = beside.read(context.module, context, LEAVES, "LoRA")
    if held is None:
        return y
    x = beside.inputs_last(context.module, args[0])
    x = beside.dropped(context.module, context, x, dropout, "lora_dropout")
    return y + branch(x.astype(y.dtype), *held).reshape(y.shape)


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


def labels(config, params):
    """``"trainable"`` for A, B, the biases that ``bias`` names and the saved modules."""
    return beside.labels(params, partial(trains, config))


def trains(config, path, flat) -> bool:
    """Whether the leaf at ``path`` trains."""
    return biases.trains(config, path, flat, "lora_scaling") or beside.trains(config, LEAVES[:2], path, flat)


def _merge(params):
    """Fold s A B into each kernel, in float32, back to the kernel's dtype; the LoRA leaves are gone afterwards."""
    return beside.merge(params, LEAVES, lambda kernel, a, b, scaling: kernel + delta(a, b, scaling))


def delta(a, b, scaling):
    """The update s A B, float32 (*stack, *in, *out), of the leaves of one module."""
    stack, rank = scaling.shape, a.shape[-1]
    product = jnp.matmul(a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1), precision="highest")
    return (product * scaling[..., None, None]).reshape(*a.shape[:-1], *b.shape[len(stack) + 1:])


def padding(config, params) -> int:
    """Elements of A and B beyond each layer's own rank."""
    flat = tree.flatten(params)
    unused = 0
    for folder in beside.folders(flat, "lora_a"):
        a, b = flat[folder + "lora_a"], flat[folder + "lora_b"]
        held = ranks(config, targets.module_names(folder.rstrip("/"), flat[folder + "lora_scaling"].shape))
        width = (a.size + b.size) // (a.shape[-1] * len(held))  # of one rank in one layer
        unused += width * int((a.shape[-1] - held).sum())
    return unused


def check_scalings(config, flat, leaf: str, alpha: str = "lora_alpha") -> None:
    """Raise ``PeftJaxError`` where the scale stored in ``leaf`` is not what the config gives."""
    for path in beside.folders(flat, leaf):
        held = flat[path + leaf]
        if not np.array_equal(np.ravel(held), scalings(config, targets.module_names(path.rstrip("/"), held.shape))):
            raise PeftJaxError(f"save_adapter: '{path}{leaf}' is not what this method's r and {alpha} give: "
                               "save with the method that made the parameters.")


def _slots(config, flat, trained: Sequence[str], naming: Naming) -> dict[str, Slot]:
    check_scalings(config, flat, "lora_scaling")
    return beside.slots(flat, trained, naming, "lora_scaling", KEYS, partial(_view, config))


def _view(config, leaf, name):
    """(*in, r) -> (r, in), (r, *out) -> (out, r), cut to the layer's own rank."""
    rank = int(ranks(config, [name])[0])
    if leaf == "lora_a":
        return (lambda a: a.reshape(-1, a.shape[-1])[:, :rank].T) if rank else None
    return (lambda b: b.reshape(b.shape[0], -1)[:rank].T) if rank else None


def numbers(config, names) -> list:
    """(rank, alpha) of each module; ``None`` where it is not adapted."""
    alphas = [targets.pattern_value(config["alpha_pattern"], name, config["lora_alpha"]) for name in names]
    return [(rank, alpha) if rank else None for rank, alpha in zip(ranks(config, names).tolist(), alphas)]


def fields(config, flat, naming) -> dict[str, Any]:
    """What peft needs in other words than ours: patterns with whole names, and empty dicts for None."""
    config, spelled = beside.portable(config, naming, numbers)
    if spelled is not None:
        config["rank_pattern"] = {f"^{name}": r for name, (r, _) in spelled.items() if r != config["r"]}
        config["alpha_pattern"] = {f"^{name}": a for name, (_, a) in spelled.items() if a != config["lora_alpha"]}
    patterns = {name: dict(config[name] or {}) for name in ("rank_pattern", "alpha_pattern")}
    return {**beside.selection(config), **patterns, "fan_in_fan_out": naming.fan_in_fan_out}


def _read(stated, where) -> dict[str, Any]:
    value = stated.get("init_lora_weights", True)
    if value not in PLAIN_INITS:
        raise PeftJaxError(f"{where} has init_lora_weights={value!r}, with which peft also changes the base weights: "
                           "save it from peft with path_initial_model_for_weight_conversion, as a plain LoRA.")
    return {**stated, "init_lora_weights": PLAIN_INITS[value]}


KEYS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
ARGUMENTS = ("r", "lora_alpha", "lora_dropout", *beside.SELECTION, "rank_pattern", "alpha_pattern", "use_rslora",
             "bias", "init_lora_weights")
# What peft starts from differs here, the base weights do not: once trained, each is a plain LoRA. All other named
# inits (pissa, olora, corda, loftq, ...) also change the base weights when the adapter is loaded.
PLAIN_INITS = {True: True, False: False, "gaussian": "gaussian", "eva": True, "orthogonal": True}
# The last four act through init_lora_weights alone; what ensure_weight_tying says, the hub looks after.
SILENT = ("fan_in_fan_out", "ensure_weight_tying", "megatron_core", "qalora_group_size", "runtime_config",
          "loftq_config", "eva_config", "corda_config", "lora_ga_config")
FORMAT = Format("LORA", lora, ARGUMENTS, _slots, fields, SILENT, _read)
