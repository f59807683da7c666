"""AdaLoRA, low-rank updates whose ranks follow their importance (arXiv 2303.10512, eq. 3, 4, 8 to 12).

    y = x W + s ((drop(x) A) * e) B        s = lora_alpha / (init_r + 1e-5)

A (in, r), e (r) and B (r, out) play the part of a singular value decomposition: a penalty on the loss keeps A' A and
B B' near I, and ``allocation.py`` sets to zero, as training goes on, the entries of e that matter least in the whole
model. No shape changes, so nothing is compiled again. Beside each adapted ``kernel`` stand
``adalora_a`` (*stack, *in, r), ``adalora_e`` (*stack, r), ``adalora_b`` (*stack, r, *out) and the frozen
``adalora_scaling`` (*stack), s, and zero for layers of a stack that are not adapted. e starts at zero, so that training
starts from the base model. What is saved leaves the zero entries out, as peft does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import kernel_axes, targeting, tree, validation
from peft_jax.core.peft_format import Format, Naming, Slot, arguments_of
from peft_jax.core.targeting import Patterns, Target
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.adalora import allocation
from peft_jax.methods.lora import init as lora_init
from peft_jax.methods.lora import low_rank, peft_file

FACTORS = allocation.FACTORS
LEAVES = (*FACTORS, "adalora_scaling")
BIASES = ("none", "all", "lora_only")


def adalora(target_r: int = 8, init_r: int = 12, lora_alpha: float = 8,
            target_modules: Patterns = ("q_proj", "v_proj"), lora_dropout: float = 0.0, *, tinit: int = 0,
            tfinal: int = 0, deltaT: int = 1, beta1: float = 0.85, beta2: float = 0.85, orth_reg_weight: float = 0.5,
            total_step: int | None = None, rank_pattern: Mapping[str, Sequence[bool]] | None = None,
            exclude_modules: Patterns = None, layers_to_transform: int | tuple[int, ...] | None = None,
            layers_pattern: Patterns = None, bias: str = "none", modules_to_save: tuple[str, ...] | None = None,
            init_lora_weights: bool = True) -> Method:
    """AdaLoRA with the arguments, meanings and defaults of Hugging Face peft's ``AdaLoraConfig``.

    Args:
      target_r: mean rank at the end; init_r: each module's rank at the start.
      lora_alpha: numerator of the scale, above 0.
      tinit: steps before ranks begin to fall; tfinal: steps after they have fallen; deltaT: steps between two cuts.
      beta1, beta2: how slowly the running means of sensitivity and uncertainty move.
      orth_reg_weight: weight of the penalty. total_step: steps of the whole training, ``None`` for what the run takes.
      rank_pattern: ``{"model.layers.0.self_attn.q_proj.lora_E": [True, False, ...]}``, of an adapter that was cut:
        as many ranks as there are True. Modules that it does not name have init_r.
      bias: which biases train: "none", "all", "lora_only" (of adapted modules).
      init_lora_weights: False starts A, B and e from normal random numbers (not the base model; for tests).
      The others as of :func:`peft_jax.lora`.

    Returns a :class:`Method` with an ``optimizer`` and a ``penalty``, which training applies; its leaves are float32.

    >>> method = adalora(init_r=4, target_r=2, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items() if name.startswith("adalora")}
    {'adalora_a': (6, 4), 'adalora_b': (4, 8), 'adalora_e': (4,), 'adalora_scaling': ()}

    Raises ``PeftJaxError`` for values out of range, and from ``init`` for patterns that match nothing.
    """
    config = kernel_adapter.tidy(
        peft_type="ADALORA", target_r=target_r, init_r=init_r, lora_alpha=lora_alpha, target_modules=target_modules,
        lora_dropout=lora_dropout, tinit=tinit, tfinal=tfinal, deltaT=deltaT, beta1=beta1, beta2=beta2,
        orth_reg_weight=orth_reg_weight, total_step=total_step, rank_pattern=rank_pattern,
        exclude_modules=exclude_modules, layers_to_transform=layers_to_transform, layers_pattern=layers_pattern,
        bias=bias, modules_to_save=modules_to_save, init_lora_weights=init_lora_weights)
    _check(config)
    method = kernel_adapter.method(
        config, trained=FACTORS, switch="adalora_scaling", leaves=_leaves, intercept=partial(_intercept, lora_dropout),
        fold=_fold, stored=FORMAT, along={"adalora_a": ("inputs", None), "adalora_b": (None, "outputs")})
    return method._replace(padding=partial(_padding, config), optimizer=partial(allocation.optimizer, config),
                           penalty=partial(orthogonality, config), vectors=("adalora_e",))


def _check(config: Mapping[str, Any]) -> None:
    for name in ("target_r", "init_r"):
        validation.check_rank(name, config[name])
    validation.check_whole("deltaT", config["deltaT"])
    if config["target_r"] > config["init_r"]:
        raise PeftJaxError(f"target_r={config['target_r']} is above init_r={config['init_r']}: ranks only fall.")
    for name in ("lora_alpha", "orth_reg_weight"):
        validation.check_number(name, config[name])
    if config["lora_alpha"] <= 0 or config["orth_reg_weight"] < 0:
        raise PeftJaxError(f"lora_alpha={config['lora_alpha']}, orth_reg_weight={config['orth_reg_weight']}: give an "
                           "alpha above 0 and a weight of at least 0.")
    for name in ("lora_dropout", "beta1", "beta2"):
        validation.check_probability(name, config[name])
    validation.check_choice("bias", config["bias"], BIASES)
    validation.check_switches(config, "init_lora_weights")
    for name in ("tinit", "tfinal"):
        validation.check_whole(name, config[name], least=0)
    _check_rank_pattern(config["rank_pattern"])
    if config["total_step"] is not None:
        validation.check_whole("total_step", config["total_step"])
        allocation.check_steps(config, config["total_step"])


def _check_rank_pattern(pattern: Any) -> None:
    validation.check_pattern("rank_pattern", pattern)
    for key, ranks in (pattern or {}).items():
        if not isinstance(ranks, list | tuple) or not all(isinstance(one, bool | int) for one in ranks):
            raise PeftJaxError(f"rank_pattern['{key}']={ranks!r}: give a list of True and False, one for each rank.")


def _leaves(config: Mapping[str, Any], key: jax.Array, target: Target, kernel: Any) -> dict[str, jax.Array]:
    _, stack, inputs, outputs = target.axes
    each = lora_init.ranks(allocation.in_ranks(config), target.names).reshape(*stack, 1)
    most = max(int(each.max()), 1)
    size = 0.02 if config["init_lora_weights"] else 1.0
    a, b, e = (size * jax.random.normal(one, (*stack, *shape), jnp.float32) for one, shape in zip(
        jax.random.split(key, 3), ((math.prod(inputs), most), (most, math.prod(outputs)), (most,))))
    own = np.arange(most) < each
    a, b, e = jnp.where(own[..., None, :], a, 0), jnp.where(own[..., None], b, 0), jnp.where(own, e, 0)
    scaling = kernel_adapter.chosen(config, target.names) * (config["lora_alpha"] / (config["init_r"] + 1e-5))
    return {"adalora_a": a.reshape(*stack, *inputs, most), "adalora_b": b.reshape(*stack, most, *outputs),
            "adalora_e": jnp.zeros_like(e) if config["init_lora_weights"] else e,
            "adalora_scaling": jnp.asarray(scaling.astype(np.float32).reshape(stack))}


def _intercept(dropout: float, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    y, module = next_fun(*args, **kwargs), context.module
    if (leaves := kernel_adapter.read(module, context, LEAVES, "AdaLoRA")) is None:
        return y
    a, b, e, scaling = leaves
    x = kernel_adapter.dropped(module, context, kernel_axes.inputs_last(module, args[0]), dropout, "lora_dropout")
    return y + low_rank.branch(x.astype(y.dtype), a * e, b, scaling).reshape(y.shape)


def _fold(kernel: jax.Array, a: jax.Array, b: jax.Array, e: jax.Array, scaling: jax.Array) -> jax.Array:
    """W + s A e B."""
    spread = e.reshape(*scaling.shape, *[1] * (a.ndim - e.ndim), e.shape[-1])
    return kernel + low_rank.delta(a * spread, b, scaling)


def orthogonality(config: Mapping[str, Any], params: Mapping[str, Any]) -> jax.Array:
    """orth_reg_weight times the mean of |A' A - I| and |B B' - I| (Frobenius) over all adapted modules and layers."""
    flat, total, count = tree.flatten(params), jnp.float32(0), 0
    for folder, own in allocation.modules(config, params):
        stack, most = own.shape[:-1], own.shape[-1]
        a = flat[folder + "adalora_a"].reshape(*stack, -1, most)
        b = flat[folder + "adalora_b"].reshape(*stack, most, -1)
        inside = own[..., None] & own[..., None, :]
        for gram in (jnp.einsum("...ni,...nj->...ij", a, a), jnp.einsum("...in,...jn->...ij", b, b)):
            squares = jnp.where(inside, jnp.square(gram - jnp.eye(most)), 0).sum((-2, -1))
            total += jnp.where(own.any(-1), jnp.sqrt(jnp.where(squares > 0, squares, 1)) * (squares > 0), 0).sum()
        count += 2 * int(own.any(-1).sum())
    return config["orth_reg_weight"] * total / max(count, 1)


def _padding(config: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    """Elements of the factors beyond each layer's own rank."""
    flat, unused = tree.flatten(params), 0
    for folder, own in allocation.modules(config, params):
        unused += sum(flat[folder + name].size for name in FACTORS) // own.size * int((~own).sum())
    return unused


def plain(config: Mapping[str, Any], flat: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Without the entries of e that are zero, unless all are, as before training: those that stay come first."""
    flat, patterns = dict(flat), {}
    folders = kernel_adapter.folders(flat, "adalora_e")
    if not any(np.any(flat[folder + "adalora_e"]) for folder in folders):
        return config, flat
    for folder in folders:
        e = np.asarray(flat[folder + "adalora_e"])
        names = targeting.module_names(folder.rstrip("/"), e.shape[:-1])
        order = np.argsort(e == 0, axis=-1, kind="stable")
        flat[folder + "adalora_e"] = np.take_along_axis(e, order, -1)
        for leaf, axis in (("adalora_a", -1), ("adalora_b", e.ndim - 1)):
            whole = np.asarray(flat[folder + leaf])
            at = [*e.shape[:-1], *[1] * (whole.ndim - e.ndim + 1)]
            at[axis] = e.shape[-1]
            flat[folder + leaf] = np.take_along_axis(whole, order.reshape(at), axis)
        counts = np.count_nonzero(e, -1).ravel()
        patterns |= {f"{name}.lora_E": [i < count for i in range(config["init_r"])] for name, count, on in zip(
            names, counts.tolist(), kernel_adapter.chosen(config, names)) if on}
    whole = all(map(all, patterns.values()))
    return {**config, "rank_pattern": None if whole else patterns}, flat


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    def view(leaf: str, name: str) -> Callable | None:
        if not kernel_adapter.chosen(config, [name])[0]:
            return None
        rank = int(lora_init.ranks(allocation.in_ranks(config), [name])[0])
        return {"adalora_a": lambda a: a.reshape(-1, a.shape[-1])[:, :rank].T,
                "adalora_b": lambda b: b.reshape(b.shape[0], -1)[:rank].T,
                "adalora_e": lambda e: e[:rank, None]}[leaf]

    keys = {"adalora_a": "lora_A", "adalora_b": "lora_B", "adalora_e": "lora_E"}
    return adapter_file.slots(flat, trained, naming, "adalora_scaling", keys, view)


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """Patterns under the file's names; peft refuses a config without the number of steps, used or not."""
    stated = {key.split(".lora_E")[0]: list(ranks) for key, ranks in (config["rank_pattern"] or {}).items()}
    each = {theirs: targeting.pattern_value(stated, ours, None) for ours, theirs in naming.pairs}
    pattern = {f"{name}.lora_E": ranks for name, ranks in each.items() if ranks is not None}
    least = config["tinit"] + config["tfinal"] + 1
    return {**adapter_file.fields(config, flat, naming), "rank_pattern": pattern or None, "fan_in_fan_out": False,
            "total_step": config["total_step"] or least}


# peft's AdaLoRA takes the last three from LoRA's config and reads none of them.
FORMAT = Format(kind="ADALORA", make=adalora, arguments=arguments_of(adalora), slots=_slots, fields=_fields,
                silent=(*peft_file.SILENT, "r", "alpha_pattern", "use_rslora"), plain=plain)
# In tables and benchmarks.
SHOWN = {"arguments": {"total_step": 1000}, "note": "12 → 8, q v", "step": {"init_r": 16}}
