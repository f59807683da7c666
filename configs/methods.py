"""The arguments of each fine-tuning method, in Hugging Face peft's words and with its defaults.

``name`` picks the method from ``peft_jax.methods.METHODS``; all other keys are passed to it.
"""

from ml_collections.config_dict import ConfigDict

from configs import bottlenecks
from configs.fields import any_type
from peft_jax.errors import PeftJaxError, nearest


def _selection() -> dict:
    """Which of the target modules are meant, as most of peft's methods say it."""
    return {
        "exclude_modules": any_type(None),
        "layers_to_transform": any_type(None),  # a layer number or several: 0,1,2
        "layers_pattern": any_type(None),
    }


def _lora() -> dict:
    return {
        "name": "lora",
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        # Names (`q_proj,v_proj`), a regular expression for whole module names, or `all-linear`.
        "target_modules": any_type(("q_proj", "v_proj")),
        **_selection(),
        "rank_pattern": any_type(None),  # "{'layers.0.self_attn.q_proj': 4}"
        "alpha_pattern": any_type(None),
        "use_rslora": False,
        "bias": "none",  # none, all, lora_only
        "modules_to_save": any_type(None),
        # True, False, gaussian, orthogonal, pissa, pissa_niter_4, olora, eva, loftq
        "init_lora_weights": any_type(True),
        "eva_config": any_type(None),  # "{'rho': 2.0, 'tau': 0.99, 'whiten': False, 'adjust_scaling_factors': True}"
        "loftq_config": any_type(None),  # "{'quant_type': 'nf4', 'block_size': 64, 'loftq_iter': 5}"
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
        **_selection(),
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


def _quantize() -> dict:
    return {
        "name": "quantize",
        "quant_type": "nf4",  # nf4, fp4, int4, int4_affine, int8
        "block_size": any_type(64),  # None: one scale an output
        "double_quant": False,
        "target_modules": any_type("all-linear"),
        "exclude_modules": any_type(None),
    }


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
        **_selection(),
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
        **_selection(),
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
        **_selection(),
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
    "bottleneck": bottlenecks.bottleneck,
    "compacter": bottlenecks.compacter,
    "dora": _dora,
    "full": _full,
    "houlsby": bottlenecks.houlsby,
    "hra": _hra,
    "ia3": _ia3,
    "ln_tuning": _ln_tuning,
    "loha": _loha,
    "lokr": _lokr,
    "lora": _lora,
    "lorafa": _lorafa,
    "loraplus": _loraplus,
    "oft": _oft,
    "parallel_adapter": bottlenecks.parallel_adapter,
    "pfeiffer": bottlenecks.pfeiffer,
    "prefix": _prefix,
    "prompt": _prompt,
    "ptuning": _ptuning,
    "quantize": _quantize,
    "trainable_tokens": _trainable_tokens,
    "vera": _vera,
}


def method_config(name: str) -> ConfigDict:
    """The section ``config.method`` for a method of ``METHODS``, or for several: ``prefix+parallel_adapter``.

    Of several each has a section of its own, ``config.method.prefix.num_virtual_tokens``; ``order`` is the chain's.
    """
    names = name.split("+")
    if len(names) == 1:
        return ConfigDict(_method(name))
    return ConfigDict({"name": "chain", "order": tuple(names), **{part: _method(part) for part in names}})


def _method(name: str) -> dict:
    if name not in METHODS:
        raise PeftJaxError(f"method={name}: {nearest(name, METHODS)}")
    return METHODS[name]()
