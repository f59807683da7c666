"""The scaled parallel adapter of He et al. (arXiv 2110.04366, section 3.3 and table 1), the adapter half of MAM.

    h + s (act(x D + b_D) U + b_U)        h the feed-forward's output, x its input

He et al.'s model has its norms last, where x is at once the residual stream and the feed-forward's input. Where norms
come first these are two: AdapterHub takes the residual stream, and so does the default here; ``original_ln_before``
takes the normed one. Leaves and options: :mod:`peft_jax.methods.bottleneck.bottleneck`.
"""

from peft_jax.core.targeting import Patterns
from peft_jax.method import Method
from peft_jax.methods.bottleneck.bottleneck import bottleneck


def parallel_adapter(reduction_factor: float = 2.0, non_linearity: str = "relu", *, bottleneck_size: int | None = None,
                     mh_adapter: bool = False, output_adapter: bool = True, scaling: float | str = 4.0,
                     original_ln_before: bool = False, ln_before: bool = False, ln_after: bool = False,
                     init_weights: str | float = "mam_adapter", dropout: float = 0.0,
                     leave_out: int | tuple[int, ...] = (), attention_modules: Patterns = ("self_attn",),
                     output_modules: Patterns = ("mlp",),
                     norm_modules: Patterns = ("input_layernorm", "post_attention_layernorm"),
                     hidden_size: int | None = None, modules_to_save: tuple[str, ...] | None = None) -> Method:
    """Parallel adapters; arguments and defaults as of :func:`peft_jax.bottleneck`, AdapterHub's ``ParBnConfig``.

    The start is the base model exactly: U is zero.

    >>> import jax, jax.numpy as jnp
    >>> params = parallel_adapter().init(jax.random.key(0), {"mlp": {"down_proj": {"kernel": jnp.ones((8, 6))}}})
    >>> params["mlp"]["adapter_down"].shape, float(jnp.abs(params["mlp"]["adapter_up"]).max())
    ((6, 3), 0.0)
    """
    return bottleneck(
        is_parallel=True, reduction_factor=reduction_factor, non_linearity=non_linearity,
        bottleneck_size=bottleneck_size, mh_adapter=mh_adapter, output_adapter=output_adapter, scaling=scaling,
        original_ln_before=original_ln_before, ln_before=ln_before, ln_after=ln_after, init_weights=init_weights,
        dropout=dropout, leave_out=leave_out, attention_modules=attention_modules, output_modules=output_modules,
        norm_modules=norm_modules, hidden_size=hidden_size, modules_to_save=modules_to_save)


# In tables and benchmarks.
SHOWN = {"arguments": {"reduction_factor": 2}, "note": "", "checked": "`adapters` 1.3, golden values"}
