"""``adapter_config.json``: Hugging Face peft's statement of a LoRA adapter, in and out (peft 0.21)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax import targets
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.hub.config import read_json
from peft_jax.methods.lora import ranks

# The arguments of lora(), in peft's words.
ARGUMENTS = ("r", "lora_alpha", "target_modules", "lora_dropout", "exclude_modules", "layers_to_transform",
             "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save",
             "init_lora_weights")
# Fields that change nothing about what a stored adapter computes. The last four act through init_lora_weights alone.
_SILENT = ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
           "peft_version", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
           "ensure_weight_tying", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
# What peft starts from differs here, the base weights do not: once trained, each is a plain LoRA. All other named
# inits (pissa, olora, corda, loftq, ...) also change the base weights when the adapter is loaded.
_PLAIN_INITS = {True: True, False: False, "gaussian": "gaussian", "eva": True, "orthogonal": True}
_EMPTY = (None, False, {}, [], "")


def read(path: Path) -> tuple[dict[str, Any], bool]:
    """The arguments of ``lora()`` that the file states, and whether peft keeps the head tied (ensure_weight_tying).

    Raises ``PeftJaxError`` naming any field that would change the result and is not supported.
    """
    given = read_json(path)
    kind = given.get("peft_type")
    if kind != "LORA":
        raise PeftJaxError(f"{path} is a '{kind}' adapter: only LORA can be loaded.")
    unknown = [f"{name}={value!r}" for name, value in sorted(given.items())
               if name not in (*ARGUMENTS, *_SILENT) and value not in _EMPTY]
    if unknown:
        raise PeftJaxError(f"{path} asks for {', '.join(unknown)}, which would change the result and is not supported: "
                           "merge the adapter with peft and load the merged model instead.")
    stated = {name: tuple(given[name]) if isinstance(given[name], list) else given[name]
              for name in ARGUMENTS if name in given}
    if "init_lora_weights" in stated:
        stated["init_lora_weights"] = _init(path, stated["init_lora_weights"])
    return stated, bool(given.get("ensure_weight_tying"))


def _init(path: Path, value):
    if value not in _PLAIN_INITS:
        raise PeftJaxError(f"{path} has init_lora_weights={value!r}, with which peft also changes the base weights: "
                           "save it from peft with path_initial_model_for_weight_conversion, as a plain LoRA.")
    return _PLAIN_INITS[value]


def without_unmatched(stated: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Without the listed ``target_modules`` that match none of ``names``: peft skips those, lora() refuses them."""
    listed = stated.get("target_modules")
    if not isinstance(listed, tuple):
        return dict(stated)
    kept = tuple(entry for entry in listed if any(targets.listed((entry,), name) for name in names))
    if not kept:
        raise PeftJaxError(f"none of the adapter's target_modules ({', '.join(listed)}) is in this model: "
                           f"{nearest(listed[0] if listed else '', (n.rsplit('.', 1)[-1] for n in names))}")
    return {**stated, "target_modules": kept}


def write(config: Mapping[str, Any], pairs: Sequence[tuple[str, str]], *, causal: bool, tied: bool,
          base_model: str | None) -> dict[str, Any]:
    """The file's content for a LoRA method's ``config``.

    Args:
      pairs: (our name, name in the file) of every module with a kernel, in all layers.
      causal: a causal language model of Hugging Face's. tied: a saved embedding is the head as well.
    """
    stated = _portable(config, pairs) if causal else config
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "ensure_weight_tying": tied,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "peft_type": "LORA",
        "revision": None,
        "task_type": "CAUSAL_LM" if causal else None,
        **{name: _plain(stated[name]) for name in ARGUMENTS},
        "rank_pattern": dict(stated["rank_pattern"] or {}),  # peft cannot read null here
        "alpha_pattern": dict(stated["alpha_pattern"] or {}),
    }


def _plain(value):
    return sorted(value) if isinstance(value, tuple | list | set | frozenset) else value


def _portable(config, pairs) -> Mapping[str, Any]:
    """The config in words that peft reads as we do.

    Our patterns may leave out peft's "model." in front of a name, which peft's may not: then every module is spelled
    out. "all-linear" becomes a list of names, as peft itself saves it.
    """
    ours, theirs = zip(*pairs, strict=True)
    wanted = _numbers(config, ours)
    if config["target_modules"] == "all-linear":
        last = {name.rsplit(".", 1)[-1] for name, (rank, _) in zip(theirs, wanted) if rank}
        config = {**config, "target_modules": tuple(sorted(last))}
    return config if _numbers(config, theirs) == wanted else _spelled(config, theirs, wanted)


def _numbers(config, names) -> list[tuple[int, float]]:
    """(rank, alpha) of each module; (0, 0) where it is not adapted."""
    own = ranks(config, names).tolist()
    alphas = [targets.pattern_value(config["alpha_pattern"], name, config["lora_alpha"]) for name in names]
    return [(rank, alpha if rank else 0) for rank, alpha in zip(own, alphas)]


def _spelled(config, names, numbers) -> dict[str, Any]:
    adapted = {name: pair for name, pair in zip(names, numbers) if pair[0]}
    return {**config, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
            "target_modules": tuple(adapted),
            "rank_pattern": {f"^{name}": rank for name, (rank, _) in adapted.items() if rank != config["r"]},
            "alpha_pattern": {f"^{name}": alpha for name, (_, alpha) in adapted.items()
                              if alpha != config["lora_alpha"]}}

