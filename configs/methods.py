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
        "init_lora_weights": any_type(True),  # True, False, gaussian
    }


def _ia3() -> dict:
    return {
        "name": "ia3",
        "target_modules": any_type(("k_proj", "v_proj", "down_proj")),
        "feedforward_modules": any_type(("down_proj",)),  # of these the input is scaled, not the output
        "exclude_modules": any_type(None),
        "modules_to_save": any_type(None),
        "init_ia3_weights": True,
    }


# What bottleneck adapters have in common, in AdapterHub's words.
_PLACES = {
    "leave_out": (),  # numbers of layers without an adapter: 0,1,2
    "attention_modules": ("self_attn",),
    "output_modules": ("mlp",),
    "hidden_size": None,  # where it cannot be told from the kernels
    "modules_to_save": None,
}
_NORMS = {"norm_modules": ("input_layernorm", "post_attention_layernorm")}  # their input is the residual stream


def _adapter(name: str, reduction_factor: float, non_linearity: str, **others) -> dict:
    shared = {
        "bottleneck_size": None,  # decides where it is set, else hidden size / reduction_factor
        "mh_adapter": True,
        "output_adapter": True,
        "scaling": 1.0,  # a number, learned, channel
        "ln_before": False,
        "ln_after": False,
        "dropout": 0.0,
        **_PLACES,
    }
    given = {**shared, **others}
    given = {key: value if isinstance(value, bool) else any_type(value) for key, value in given.items()}
    return {"name": name, "reduction_factor": float(reduction_factor), "non_linearity": non_linearity, **given}


def _bottleneck() -> dict:
    return _adapter("bottleneck", 16, "gelu", is_parallel=False, original_ln_before=False, init_weights="bert",
                    **_NORMS)


def _houlsby() -> dict:
    return _adapter("houlsby", 16, "gelu", init_weights=1e-3)


def _pfeiffer() -> dict:
    return _adapter("pfeiffer", 16, "relu", mh_adapter=False, original_ln_before=True, init_weights="bert", **_NORMS)


def _parallel_adapter() -> dict:
    return _adapter("parallel_adapter", 2, "relu", mh_adapter=False, scaling=4.0, original_ln_before=False,
                    init_weights="mam_adapter", **_NORMS)


def _compacter() -> dict:
    return _adapter("compacter", 32, "gelu", original_ln_before=False, phm_dim=4, phm_rank=1, factorized_phm_W=True,
                    shared_phm_rule=True, factorized_phm_rule=False, phm_init_range=1e-4, phm_bias=True, **_NORMS)


METHODS = {
    "bottleneck": _bottleneck,
    "compacter": _compacter,
    "houlsby": _houlsby,
    "ia3": _ia3,
    "lora": _lora,
    "parallel_adapter": _parallel_adapter,
    "pfeiffer": _pfeiffer,
}


def method_config(name: str) -> ConfigDict:
    """The section ``config.method`` for a method of ``METHODS``."""
    return ConfigDict(METHODS[name]())
