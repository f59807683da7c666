"""The arguments of each fine-tuning method, in Hugging Face peft's words and with its defaults.

``name`` picks the method from ``peft_jax.methods.METHODS``; all other keys are passed to it.
"""

from ml_collections.config_dict import ConfigDict, FieldReference


def any_type(value) -> FieldReference:
    """A field that also takes values of another type than its default's, such as a name, a tuple of names or None."""
    return FieldReference(value, field_type=object)


def _lora() -> dict:
    return {
        "name": "lora",
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        # Names (`q_proj,v_proj`), a regular expression for whole module names, or `all-linear`.
        "target_modules": any_type(("q_proj", "v_proj")),
        "exclude_modules": any_type(None),
        "layers_to_transform": any_type(None),  # a layer number or several: 0,1,2
        "layers_pattern": any_type(None),
        "rank_pattern": any_type(None),  # "{'layers.0.self_attn.q_proj': 4}"
        "alpha_pattern": any_type(None),
        "use_rslora": False,
        "bias": "none",  # none, all, lora_only
        "modules_to_save": any_type(None),
        "init_lora_weights": any_type(True),  # True, False, gaussian, orthogonal, pissa, pissa_niter_4, olora, eva
        "eva_config": any_type(None),  # "{'rho': 2.0, 'tau': 0.99, 'whiten': False, 'adjust_scaling_factors': True}"
    }


def _dora() -> dict:
    return _lora() | {"name": "dora"}


def _lorafa() -> dict:
    return _lora() | {"name": "lorafa"}


def _loraplus() -> dict:
    return _lora() | {"name": "loraplus"}  # the ratio is optim.rates


def _ia3() -> dict:
    return {
        "name": "ia3",
        "target_modules": any_type(("k_proj", "v_proj", "down_proj")),
        "feedforward_modules": any_type(("down_proj",)),  # of these the input is scaled, not the output
        "exclude_modules": any_type(None),
        "modules_to_save": any_type(None),
        "init_ia3_weights": True,
    }


METHODS = {"dora": _dora, "ia3": _ia3, "lora": _lora, "lorafa": _lorafa, "loraplus": _loraplus}


def method_config(name: str) -> ConfigDict:
    """The section ``config.method`` for a method of ``METHODS``."""
    return ConfigDict(METHODS[name]())
