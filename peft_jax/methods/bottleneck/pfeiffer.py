"""The adapter of Pfeiffer et al. (arXiv 2005.00247, section 3 and appendix): one a layer, after the feed-forward layer.

    h + act(u D + b_D) U + b_U        h the feed-forward's output, u = h + the residual stream

In a model whose norms come first this is an adapter on the layer's own output, as AdapterHub has it. Leaves and
options: :mod:`peft_jax.methods.bottleneck.bottleneck`.
"""

from peft_jax.core.targeting import Patterns
from peft_jax.method import Method
from peft_jax.methods.bottleneck.bottleneck import bottleneck


def pfeiffer(reduction_factor: float = 16.0, non_linearity: str = "relu", *, bottleneck_size: int | None = None,
             mh_adapter: bool = False, output_adapter: bool = True, scaling: float | str = 1.0,
             original_ln_before: bool = True, ln_before: bool = False, ln_after: bool = False,
             init_weights: str | float = "bert", dropout: float = 0.0, leave_out: int | tuple[int, ...] = (),
             attention_modules: Patterns = ("self_attn",), output_modules: Patterns = ("mlp",),
             norm_modules: Patterns = ("input_layernorm", "post_attention_layernorm"), hidden_size: int | None = None,
             modules_to_save: tuple[str, ...] | None = None) -> Method:
    """Pfeiffer adapters; arguments and defaults as of :func:`peft_jax.bottleneck`, AdapterHub's ``SeqBnConfig``.

    >>> import jax, jax.numpy as jnp
    >>> params = pfeiffer(3).init(jax.random.key(0), {"mlp": {"down_proj": {"kernel": jnp.ones((8, 6))}}})
    >>> params["mlp"]["adapter_down"].shape
    (6, 2)
    """
    return bottleneck(
        reduction_factor=reduction_factor, non_linearity=non_linearity, bottleneck_size=bottleneck_size,
        mh_adapter=mh_adapter, output_adapter=output_adapter, scaling=scaling, original_ln_before=original_ln_before,
        ln_before=ln_before, ln_after=ln_after, init_weights=init_weights, dropout=dropout, leave_out=leave_out,
        attention_modules=attention_modules, output_modules=output_modules, norm_modules=norm_modules,
        hidden_size=hidden_size, modules_to_save=modules_to_save)


# In tables and benchmarks.
SHOWN = {"arguments": {"reduction_factor": 16}, "note": "", "checked": "`adapters` 1.3, golden values"}
