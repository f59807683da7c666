"""How a LoRA lies in Hugging Face peft's two files, and what its config says there; see core/peft_format.py."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from peft_jax import quant
from peft_jax.core import patterns, targeting, tree, validation
from peft_jax.core.peft_format import PREFIX, Naming, Slot
from peft_jax.errors import PeftJaxError
from peft_jax.method import FROZEN, Method
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods import _own_weights as own_weights
from peft_jax.methods.lora import init as lora_init
from peft_jax.methods.lora import loftq
from peft_jax.methods.lora.init import ranks, scalings

LEAVES = ("lora_a", "lora_b", "lora_scaling")
START = ("lora_a0", "lora_b0")  # frozen: what A and B began with, where that was taken out of the kernel
KEYS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
DEFAULTS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
ARGUMENTS = ("r", "lora_alpha", "lora_dropout", *kernel_adapter.SELECTION, "rank_pattern", "alpha_pattern",
             "use_rslora", "bias", "init_lora_weights", "ensure_weight_tying")
# What peft starts from differs here, the base weights do not: once trained, each is a plain LoRA. All other named
# inits (pissa, olora, corda, loftq, ...) also change the base weights when the adapter is loaded.
PLAIN_INITS = {True: True, False: False, "gaussian": "gaussian", "eva": True, "orthogonal": True}
# The last four act through init_lora_weights alone.
SILENT = ("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
          "loftq_config", "eva_config", "corda_config", "lora_ga_config")


def check_scalings(config: Mapping[str, Any], flat: Mapping[str, Any], leaf: str, alpha: str = "lora_alpha") -> None:
    """Raise ``PeftJaxError`` where the scale stored in ``leaf`` is not what the config gives."""
    for path in kernel_adapter.folders(flat, leaf):
        scaling = flat[path + leaf]
        names = targeting.module_names(path.rstrip("/"), scaling.shape)
        if not np.array_equal(np.ravel(scaling), scalings(config, names)):
            raise PeftJaxError(f"save_adapter: '{path}{leaf}' is not what this method's r and {alpha} give: "
                               "save with the method that made the parameters.")


def check_split(flat: Mapping[str, Any]) -> None:
    """Raise ``PeftJaxError`` where a kernel trains of which a part was split off: what it was could not be told."""
    marks = own_weights.marks_of(flat)
    for folder in kernel_adapter.folders(flat, START[0]):
        if own := marks.get(f"{folder}kernel"):
            raise PeftJaxError(f"'{folder}kernel' trains as a whole ('{own[0]}') and by a LoRA that split it: leave "
                               "it out of one of them, or take another init_lora_weights.")


def plain(config: Mapping[str, Any], flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """As a plain LoRA on the base as it was: of double rank where a part of the kernels was split off."""
    check_scalings(config, flat, "lora_scaling")
    single = {**config, "init_lora_weights": True, "eva_config": None, "loftq_config": None}
    if not lora_init.splits(config["init_lora_weights"]):
        return single, dict(flat)
    double, flat = lora_init.doubled(single), dict(flat)
    for path in kernel_adapter.folders(flat, "lora_a0"):
        stack = flat[path + "lora_scaling"].shape
        names = targeting.module_names(path.rstrip("/"), stack)
        pairs = [np.asarray(flat.pop(path + leaf)) for leaf in (*LEAVES[:2], *START)]
        a, b = lora_init.difference(*pairs, ranks(config, names).reshape(stack))
        flat |= dict(zip([path + leaf for leaf in LEAVES], (a, b, scalings(double, names).reshape(stack))))
    return double, flat


def unsavable_because(config: Mapping[str, Any], flat: Mapping[str, Any]) -> str:
    """Where what was quantised is not the base's own kernel but what the start left of it, no other base has that."""
    if not loftq.keeps_base(config["init_lora_weights"], config["loftq_config"]):
        return "LoftQ of several rounds gives a quantised base of its own"
    for folder in kernel_adapter.folders(flat, START[0]):
        if quant.is_leaf(flat.get(f"{folder}kernel")):
            return f"'{folder}kernel' was quantised after {config['init_lora_weights']} took a part out of it"
    return ""


def as_plain(method: Method, params: Mapping[str, Any], what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and flat leaves of ``params`` as a plain LoRA on the base as it was.

    Raises ``PeftJaxError``, about ``what``, for another method and where leaves of the base train too.
    """
    flat, labels = tree.flatten(params), tree.flatten(method.labels(params))
    odd = [path for path in flat if labels[path] != FROZEN and path.rpartition("/")[2] not in LEAVES]
    if method.config["peft_type"] != "LORA" or odd:
        why = f"trains '{odd[0]}'" if odd else f"is {method.config['peft_type']}"
        raise PeftJaxError(f"{what} {why}: only plain LoRA can be mixed or combined; switch with "
                           "peft_jax.combine(base, adapter) instead.")
    return plain(method.config, flat)


def slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
          keys: Mapping[str, str] | None = None, cut: Callable | None = None) -> dict[str, Slot]:
    """The tensors; a variant with leaves of its own gives ``keys`` and ``cut`` in place of ``KEYS`` and ``view``."""
    tensors = adapter_file.slots(flat, trained, naming, "lora_scaling", keys or KEYS, partial(cut or view, config))
    return dict(entry for key, slot in tensors.items() for entry in _embedding_keys(key, slot, flat, naming))


def _embedding_keys(key: str, slot: Slot, flat: Mapping[str, Any], naming: Naming) -> list[tuple[str, Slot]]:
    """peft names A and B of an embedding otherwise, and stores those of a head that is tied to it once more."""
    folder, _, leaf = slot.path.rpartition("/")
    if f"{folder}/embedding" not in flat or leaf not in KEYS:
        return [(key, slot)]
    own = key.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B")
    other = {"lora_a": "lora_B.weight", "lora_b": "lora_A.weight"}[leaf]
    head = naming.tied.get(folder)
    return [(own, slot), *([(f"{PREFIX}{head}.{other}", Slot(slot.path))] if head else [])]


def view(config: Mapping[str, Any], leaf: str, name: str) -> Callable | None:
    """(*in, r) -> (r, in), (r, *out) -> (out, r), cut to the layer's own rank."""
    rank = int(ranks(config, [name])[0])
    if leaf == "lora_a":
        return (lambda a: a.reshape(-1, a.shape[-1])[:, :rank].T) if rank else None
    return (lambda b: b.reshape(b.shape[0], -1)[:rank].T) if rank else None


def numbers(config: Mapping[str, Any], names: Sequence[str]) -> list:
    """(rank, alpha) of each module; ``None`` where it is not adapted."""
    alphas = [targeting.pattern_value(config["alpha_pattern"], name, config["lora_alpha"]) for name in names]
    return [(rank, alpha) if rank else None for rank, alpha in zip(ranks(config, names).tolist(), alphas)]


def fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """What peft needs in other words than ours: patterns with whole names, and empty dicts for None."""
    config, spelled = adapter_file.portable(config, naming, numbers)
    if spelled is not None:
        config["rank_pattern"] = {f"^{name}": r for name, (r, _) in spelled.items() if r != config["r"]}
        config["alpha_pattern"] = {f"^{name}": a for name, (_, a) in spelled.items() if a != config["lora_alpha"]}
    stated = {name: dict(config[name] or {}) for name in DEFAULTS}
    for path, head in naming.tied.items():
        if f"{path}/lora_a" in flat:  # peft scales a tied head's update by the head's own rank and alpha
            config["target_modules"] = _naming_bare(config["target_modules"], path)
            for name, (own, other) in _both(config, naming.modules(path, ())[0], head).items():
                stated[name] |= {head: own} if own != other else {}
    return {**kernel_adapter.selection(config), **stated, "fan_in_fan_out": naming.fan_in_fan_out, "loftq_config": {}}


def _naming_bare(wanted: Any, embedding: str) -> Any:
    """peft keeps a head tied where a regex means the embedding's name without what stands in front, too."""
    bare = not isinstance(wanted, str) or patterns.match(wanted, embedding, whole=True)
    return wanted if bare else f"{wanted}|{embedding}"


def _both(config: Mapping[str, Any], *names: str) -> dict[str, list]:
    """Rank and alpha by the name of their pattern, each a list for the modules ``names``."""
    return {pattern: [targeting.pattern_value(config.get(pattern), name, config.get(default)) for name in names]
            for pattern, default in DEFAULTS.items()}


def read(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The file's arguments as :func:`lora` takes them."""
    stated = dict(stated)
    tied, value = stated.pop("ensure_weight_tying", False), stated.get("init_lora_weights", True)
    if value not in PLAIN_INITS:
        raise PeftJaxError(f"{where} has init_lora_weights={value!r}, with which peft also changes the base weights: "
                           "save it from peft with path_initial_model_for_weight_conversion, as a plain LoRA.")
    for pattern in DEFAULTS:
        validation.check_pattern(pattern, stated.get(pattern))
    pairs = _both(stated, "model.embed_tokens", "lm_head")
    adapted = targeting.listed(stated.get("target_modules"), "model.embed_tokens")
    if tied and adapted and any(own != other for own, other in pairs.values()):
        raise PeftJaxError(f"{where} ties the head to the embedding and gives them different ranks or alphas, by which "
                           "peft scales one update in two ways: that cannot be loaded.")
    return {**stated, "init_lora_weights": PLAIN_INITS[value]}
