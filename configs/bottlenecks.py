"""The arguments of bottleneck adapters, in AdapterHub's words and with its or the papers' defaults."""

from configs.fields import any_type

# What they have in common.
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


def bottleneck() -> dict:
    return _adapter("bottleneck", 16, "gelu", is_parallel=False, original_ln_before=False, init_weights="bert",
                    **_NORMS)


def houlsby() -> dict:
    return _adapter("houlsby", 16, "gelu", init_weights=1e-3)


def pfeiffer() -> dict:
    return _adapter("pfeiffer", 16, "relu", mh_adapter=False, original_ln_before=True, init_weights="bert", **_NORMS)


def parallel_adapter() -> dict:
    return _adapter("parallel_adapter", 2, "relu", mh_adapter=False, scaling=4.0, original_ln_before=False,
                    init_weights="mam_adapter", **_NORMS)


def compacter() -> dict:
    return _adapter("compacter", 32, "gelu", original_ln_before=False, phm_dim=4, phm_rank=1, factorized_phm_W=True,
                    shared_phm_rule=True, factorized_phm_rule=False, phm_init_range=1e-4, phm_bias=True, **_NORMS)
