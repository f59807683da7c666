"""LoRA, low-rank adaptation (arXiv 2106.09685, eq. 3), with rank-stabilised scaling (arXiv 2312.03732).

    y = x W + s (drop(x) A) B        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

W (in, out) is frozen, A (in, r) starts random and B (r, out) at zero, so that training starts from the base model.
Beside each adapted ``kernel`` stand ``lora_a`` (*stack, *in, r), ``lora_b`` (*stack, r, *out) and the frozen
``lora_scaling`` (*stack): one s for each layer of a scanned stack. Layers of a stack with a smaller rank, or with none,
are filled with zeros on both sides of the product, which stay zero under any gradient step. An embedding counts as the
kernel of a one-hot input: ``lora_a`` (vocabulary, r) is looked up, and where the embedding also serves as the head,
the update does too. What A and B start from is told in init.py and eva.py.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from peft_jax.core import kernel_axes, targeting, tree, validation
from peft_jax.core.peft_format import Format
from peft_jax.core.targeting import Patterns, Target
from peft_jax.method import Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora import eva, loftq
from peft_jax.methods.lora import init as lora_init
from peft_jax.methods.lora.init import ranks, scalings
from peft_jax.methods.lora.low_rank import branch, delta, scaled
from peft_jax.methods.lora.peft_file import (
    ARGUMENTS,
    LEAVES,
    SILENT,
    START,
    check_split,
    fields,
    plain,
    read,
    slots,
    unsavable_because,
)

BIASES = ("none", "all", "lora_only")


def lora(r: int = 8, lora_alpha: float = 8, target_modules: Patterns = ("q_proj", "v_proj"), lora_dropout: float = 0.0,
         *, exclude_modules: Patterns = None, layers_to_transform: int | tuple[int, ...] | None = None,
         layers_pattern: Patterns = None, rank_pattern: Mapping[str, int] | None = None,
         alpha_pattern: Mapping[str, float] | None = None, use_rslora: bool = False, bias: str = "none",
         modules_to_save: tuple[str, ...] | None = None, init_lora_weights: bool | str = True,
         eva_config: Mapping[str, Any] | None = None, loftq_config: Mapping[str, Any] | None = None) -> Method:
    """LoRA with the arguments, meanings and defaults of Hugging Face peft's ``LoraConfig``.

    Args:
      r: rank of the update. lora_alpha: numerator of the scale.
      target_modules: a list of module names or their endings, a regex for whole names, or ``"all-linear"`` (every
        kernel but the output head). peft's ``None`` is its default for the model's family; here that is q and v. A
        list or regex may name embeddings: a tied head then changes with it (peft's ensure_weight_tying); after
        ``peft_jax.untie`` it does not (peft's default). peft never keeps GPT-2's ``wte`` tied: untie it to save it.
      lora_dropout: probability that an input element of the branch is dropped; needs ``rngs={"dropout": key}``.
      exclude_modules: modules to leave out, written as target_modules.
      layers_to_transform: layer numbers; layers_pattern: the word in front of the number, ``None`` for any.
      rank_pattern, alpha_pattern: ``{regex for the end of a name: value}``, exceptions from r and lora_alpha.
      bias: which biases train: "none", "all", "lora_only" (of adapted modules).
      modules_to_save: endings of names of modules that train as a whole. On a model whose head is tied,
        "embed_tokens" keeps the tie (peft's ensure_weight_tying); after ``peft_jax.untie`` it does not (peft's
        default).
      init_lora_weights: True for A uniform within 1/sqrt(in); "gaussian" for A normal with deviation 1/r; "orthogonal",
        "pissa", "pissa_niter_4" and "olora", see init.py; "eva", see eva.py: call ``prepare`` with data first;
        "loftq", see loftq.py: it quantises the kernel; False for A and B both uniform (for tests: training does not
        start from the base model).
      eva_config: ``{"rho", "tau", "whiten", "adjust_scaling_factors"}``, of peft's ``EvaConfig``.
      loftq_config: ``{"quant_type", "block_size", "double_quant"}``, as of ``quantize``, and ``"loftq_iter"``.

    Returns a :class:`Method`. Leaves are float32 whatever the base's dtype; the branch computes in the module's.

    >>> method = lora(r=4, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items()}
    {'kernel': (6, 8), 'lora_a': (6, 4), 'lora_b': (4, 8), 'lora_scaling': ()}

    Raises ``PeftJaxError`` for values out of range, and from ``init`` for patterns that match nothing.
    """
    config = kernel_adapter.tidy(
        peft_type="LORA", r=r, lora_alpha=lora_alpha, target_modules=target_modules, lora_dropout=lora_dropout,
        exclude_modules=exclude_modules, layers_to_transform=layers_to_transform, layers_pattern=layers_pattern,
        rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, use_rslora=use_rslora, bias=bias,
        modules_to_save=modules_to_save, init_lora_weights=init_lora_weights, eva_config=eva_config,
        loftq_config=loftq_config)
    _check(config)
    return _method(config)


def _method(config: Mapping[str, Any], starts: Mapping[str, jax.Array] | None = None) -> Method:
    changes = lora_init.changes(config["init_lora_weights"])  # the kernel, so nothing may have changed it before
    method = build(config, starts, _method, trained=LEAVES[:2], leaves=partial(leaves, starts=starts),
                   intercept=partial(_intercept, config["lora_dropout"]), fold=_fold, stored=FORMAT, along=ALONG,
                   holders=kernel_axes.HOLDERS,
                   first=f"init_lora_weights={config['init_lora_weights']!r}" if changes else "")
    return method._replace(padding=partial(padding, config))


def build(config: Mapping[str, Any], starts: Mapping[str, jax.Array] | None, again: Callable[..., Method],
          **parts: Any) -> Method:
    """What LoRA and DoRA have in common: ``parts`` of ``_kernel_adapter.method``, and a start that may need data.

    Args:
      starts: ``{path: A}`` for the modules whose A comes from data.
      again: ``(config, starts) -> Method``, the method after it has seen data.
    """

    def prepare(*args: Any, **kwargs: Any) -> Method:
        return again(*prepared(config, *args, **kwargs))

    method = kernel_adapter.method(config, switch="lora_scaling", unused=START, **parts)
    needs_data = config["init_lora_weights"] == "eva" and starts is None
    return method._replace(labels=partial(_labels, method.labels), prepare=prepare if needs_data else None,
                           base_quantization=loftq.base(config))


def _check(config: Mapping[str, Any]) -> None:
    validation.check_patterns(config, "r", "lora_alpha")
    validation.check_probability("lora_dropout", config["lora_dropout"])
    validation.check_choice("bias", config["bias"], BIASES)
    validation.check_switches(config, "use_rslora")
    lora_init.check(config["init_lora_weights"])
    eva.check(config["eva_config"])
    loftq.check(config["loftq_config"])


def leaves(config: Mapping[str, Any], key: jax.Array, target: Target, kernel: Any,
           starts: Mapping[str, jax.Array] | None = None) -> dict[str, jax.Array]:
    """``lora_a``, ``lora_b`` and ``lora_scaling`` of one target; A from ``starts``, by path, where it is there.

    A start that splits the kernel brings ``lora_a0``, ``lora_b0`` and the rest of the kernel with it, one that
    quantises it the quantised kernel.
    """
    _, stack, inputs, outputs = target.axes
    each, scaling = (of(config, target.names).reshape(stack) for of in (ranks, scalings))
    how = config["init_lora_weights"] if target.leaf == "kernel" else bool(config["init_lora_weights"])
    a, b, *changed = lora_init.start(how, target, key, kernel, each, scaling, (starts or {}).get(target.path),
                                     config["loftq_config"])
    new = {"lora_a": a.reshape(*stack, *inputs, -1), "lora_b": b.reshape(*stack, -1, *outputs),
           "lora_scaling": jnp.asarray(scaling)}
    if changed:
        return new | {target.leaf: changed[0]}
    if lora_init.splits(config["init_lora_weights"]):
        rest = kernel.astype(jnp.float32) - delta(*new.values())
        new |= {"lora_a0": new["lora_a"], "lora_b0": new["lora_b"], target.leaf: rest.astype(kernel.dtype)}
    return new


def prepared(config: Mapping[str, Any], model: Any, params: Mapping[str, Any], batches: Any,
             axes: Mapping[str, kernel_axes.KernelAxes] | None = None) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The config with ranks from the inputs that modules see, and their A by path; see eva.py."""
    targets = targeting.find(params, axes, kernel_adapter.selection(config), kernel_axes.HOLDERS)
    kinds = {leaf: [target for target in targets if target.leaf == leaf] for leaf in kernel_axes.HOLDERS}
    each, embedded = ({name: int(rank) for target in kinds[leaf] for name, rank in zip(target.names, ranks(
        config, target.names)) if rank} for leaf in kernel_axes.HOLDERS)
    chosen, starts = eva.analyse(config["eva_config"], model, params, batches, kinds["kernel"], each)
    chosen, each = chosen | embedded, each | embedded
    alphas = {name: targeting.pattern_value(config["alpha_pattern"], name, config["lora_alpha"]) for name in chosen}
    if eva.settings(config["eva_config"])["adjust_scaling_factors"]:
        alphas = {name: alpha * chosen[name] / each[name] for name, alpha in alphas.items()}
    selection = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return {**config, **selection, "target_modules": tuple(chosen),
            "rank_pattern": {f"^{name}": rank for name, rank in chosen.items() if rank != config["r"]},
            "alpha_pattern": {f"^{name}": alpha for name, alpha in alphas.items()
                              if alpha != config["lora_alpha"]}}, starts


def _intercept(dropout: float, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    y, module = next_fun(*args, **kwargs), context.module
    if isinstance(module, nn.Embed) and context.of_flax:
        return y + _embedded(module, context.method_name, args[0], y) if module.has_variable("params", "lora_a") else y
    if (own := kernel_adapter.read(module, context, LEAVES, "LoRA")) is None:
        return y
    x = kernel_axes.inputs_last(module, args[0])
    x = kernel_adapter.dropped(module, context, x, dropout, "lora_dropout")
    return y + branch(x.astype(y.dtype), *own).reshape(y.shape)


def _embedded(module: nn.Module, method_name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """What the update of an embedding adds to its rows ``y`` for ids ``x``, or to the logits ``y`` of states ``x``."""
    a, b, scaling = (module.get_variable("params", leaf) for leaf in LEAVES)
    if method_name == "attend":
        return branch(x.astype(y.dtype), b.T, a.T, scaling).reshape(y.shape)
    return scaled(jnp.take(a, x, axis=0).astype(y.dtype), scaling) @ b.astype(y.dtype)


def _labels(labels: Callable[..., tree.Tree], params: Mapping[str, Any]) -> tree.Tree:
    """Raises ``PeftJaxError`` where a kernel trains of which a part was split off."""
    check_split(tree.flatten(params))
    return labels(params)


def _fold(kernel: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array) -> jax.Array:
    return kernel + delta(a, b, scaling)


def padding(config: Mapping[str, Any], params: Mapping[str, Any], trained: Sequence[str] = LEAVES[:2]) -> int:
    """Elements of A and B, or what of them is ``trained``, beyond each layer's own rank."""
    flat = tree.flatten(params)
    unused = 0
    for folder in kernel_adapter.folders(flat, "lora_a"):
        most = flat[folder + "lora_a"].shape[-1]
        each = ranks(config, targeting.module_names(folder.rstrip("/"), flat[folder + "lora_scaling"].shape))
        width = sum(flat[folder + leaf].size for leaf in trained) // (most * len(each))  # of one rank in one layer
        unused += width * int((most - each).sum())
    return unused


# How tables and benchmarks show the method.
SHOWN = {"arguments": {"r": 16, "lora_alpha": 32}}
ALONG = {"lora_a": ("inputs", None), "lora_b": (None, "outputs")}
FORMAT = Format(kind="LORA", make=lora, arguments=ARGUMENTS, slots=slots, fields=fields, silent=SILENT, read=read,
                claims=lambda stated: not stated.get("use_dora"), plain=plain, unsavable_because=unsavable_because)
