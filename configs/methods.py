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


def _ia3() -> dict:
    return {
        "name": "ia3",
        "target_modules": any_type(("k_proj", "v_proj", "down_proj")),
        "feedforward_modules": any_type(("down_proj",)),  # of these the input is scaled, not the output
        "exclude_modules": any_type(None),
        "modules_to_save": any_type(None),
        "init_ia3_weights": True,
    }


def _loha() -> dict:
    return {
        "name": "loha",
        "r": 8,
        "alpha": 8,
        "target_modules": any_type(("q_proj", "v_proj")),
        "rank_dropout": 0.0,  # of output elements
        "module_dropout": 0.0,
        "exclude_modules": any_type(None),
        "layers_to_transform": any_type(None),
        "layers_pattern": any_type(None),
        "rank_pattern": any_type(None),
        "alpha_pattern": any_type(None),
        "modules_to_save": any_type(None),
        "init_weights": True,
    }


def _lokr() -> dict:
    return _loha() | {
        "name": "lokr",
        "decompose_both": False,
        "decompose_factor": -1,  # -1: near the square root
        "rank_dropout_scale": False,
        "init_weights": any_type(True),  # True, False, lycoris
    }


def _prefix() -> dict:
    return {
        "name": "prefix",
        "num_virtual_tokens": 20,
        "token_dim": any_type(None),  # these three: None takes what the model has
        "num_layers": any_type(None),
        "num_attention_heads": any_type(None),
        "prefix_projection": False,
        "encoder_hidden_size": any_type(None),
        "init_weights": any_type(None),  # zero; None: normal of init_std
        "init_std": 0.01,
        "shift_positions": True,
    }


def _prompt() -> dict:
    return {
        "name": "prompt",
        "num_virtual_tokens": 20,
        "prompt_tuning_init": "RANDOM",  # RANDOM, SAMPLE_VOCAB, TEXT
        "prompt_tuning_init_ids": any_type(None),  # for TEXT: 504,3216
    }


def _ptuning() -> dict:
    return {
        "name": "ptuning",
        "num_virtual_tokens": 20,
        "encoder_reparameterization_type": any_type("MLP"),  # MLP, LSTM, None
        "encoder_hidden_size": any_type(None),
        "encoder_num_layers": 2,
        "encoder_dropout": 0.0,
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


def _adalora() -> dict:
    return {
        "name": "adalora",
        "target_r": 8,  # mean rank at the end
        "init_r": 12,
        "lora_alpha": 8,
        "target_modules": any_type(("q_proj", "v_proj")),
        "lora_dropout": 0.0,
        "tinit": 0,  # steps before ranks begin to fall
        "tfinal": 0,  # steps after they have fallen
        "deltaT": 1,  # steps between two cuts
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "total_step": any_type(None),  # None: the steps of the run
        "rank_pattern": any_type(None),
        "exclude_modules": any_type(None),
        "layers_to_transform": any_type(None),
        "layers_pattern": any_type(None),
        "bias": "none",  # none, all, lora_only
        "modules_to_save": any_type(None),
        "init_lora_weights": True,
    }


def _hra() -> dict:
    return {
        "name": "hra",
        "r": 8,
        "apply_GS": False,  # Gram-Schmidt
        "target_modules": any_type(("q_proj", "v_proj")),
        "bias": "none",  # none, all, hra_only
        "exclude_modules": any_type(None),
        "layers_to_transform": any_type(None),
        "layers_pattern": any_type(None),
        "modules_to_save": any_type(None),
        "init_weights": True,
    }


def _oft() -> dict:
    return {
        "name": "oft",
        "r": 0,  # number of blocks, or oft_block_size: one of the two is 0
        "oft_block_size": 32,
        "module_dropout": 0.0,  # of blocks
        "target_modules": any_type(("q_proj", "v_proj")),
        "bias": "none",  # none, all, oft_only
        "coft": False,
        "eps": 6e-5,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "exclude_modules": any_type(None),
        "layers_to_transform": any_type(None),
        "layers_pattern": any_type(None),
        "modules_to_save": any_type(None),
        "init_weights": True,
    }


def _vera() -> dict:
    return {
        "name": "vera",
        "r": 256,
        "target_modules": any_type(("q_proj", "v_proj")),
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "projection_prng_key": 0,  # seed of the shared projections
        "bias": "none",  # none, all, vera_only
        "layers_to_transform": any_type(None),
        "layers_pattern": any_type(None),
        "modules_to_save": any_type(None),
        "init_weights": True,
    }


def _full() -> dict:
    return {
        "name": "full",
        "patterns": any_type((".*",)),  # regular expressions for whole paths of leaves: layers/mlp/up_proj/kernel
        "exclude": any_type(()),
        "last_n_layers": any_type(None),
        "embeddings": any_type(None),  # None: yes, but not with last_n_layers
        "head": True,
    }


def _bitfit() -> dict:
    return {
        "name": "bitfit",
        "target_modules": any_type(None),  # None: every bias
        "exclude_modules": any_type(None),
        "modules_to_save": any_type(None),
        "add_missing": False,  # give kernels without a bias one
    }


def _ln_tuning() -> dict:
    return {
        "name": "ln_tuning",
        "target_modules": any_type(("input_layernorm", "post_attention_layernorm", "norm")),
        "exclude_modules": any_type(None),
        "modules_to_save": any_type(None),
    }


def _trainable_tokens() -> dict:
    return {
        "name": "trainable_tokens",
        "token_indices": any_type(()),
        "target_modules": any_type(None),  # None: the input embedding
        "init_weights": True,
    }


def _dora() -> dict:
    return _lora() | {"name": "dora"}


def _lorafa() -> dict:
    return _lora() | {"name": "lorafa"}


def _loraplus() -> dict:
    return _lora() | {"name": "loraplus"}  # the ratio is optim.rates


METHODS = {
    "adalora": _adalora,
    "bitfit": _bitfit,
    "bottleneck": _bottleneck,
    "compacter": _compacter,
    "dora": _dora,
    "full": _full,
    "houlsby": _houlsby,
    "hra": _hra,
    "ia3": _ia3,
    "ln_tuning": _ln_tuning,
    "loha": _loha,
    "lokr": _lokr,
    "lora": _lora,
    "lorafa": _lorafa,
    "loraplus": _loraplus,
    "oft": _oft,
    "parallel_adapter": _parallel_adapter,
    "pfeiffer": _pfeiffer,
    "prefix": _prefix,
    "prompt": _prompt,
    "ptuning": _ptuning,
    "trainable_tokens": _trainable_tokens,
    "vera": _vera,
}


def method_config(name: str) -> ConfigDict:
    """The section ``config.method`` for a method of ``METHODS``."""
    return ConfigDict(METHODS[name]())
