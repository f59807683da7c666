"""Adapter layers of Houlsby et al. (arXiv 1902.00751, section 2.1): after attention and after the feed-forward layer.

    h + act(h D + b_D) U + b_U        of each sublayer's output h, before the residual addition

Leaves and options: ``bottleneck.py``. With width h and bottleneck b a module has 2 h b + b + h.
"""

from peft_jax.core.targeting import Patterns
from peft_jax.method import Method
from peft_jax.methods.bottleneck.bottleneck import bottleneck


def houlsby(reduction_factor: float = 16.0, non_linearity: str = "gelu", *, bottleneck_size: int | None = None,
            mh_adapter: bool = True, output_adapter: bool = True, scaling: float | str = 1.0, ln_before: bool = False,
            ln_after: bool = False, init_weights: str | float = 1e-3, dropout: float = 0.0,
            leave_out: int | tuple[int, ...] = (), attention_modules: Patterns = ("self_attn",),
            output_modules: Patterns = ("mlp",), hidden_size: int | None = None,
            modules_to_save: tuple[str, ...] | None = None) -> Method:
    """Houlsby adapters; arguments as of :func:`peft_jax.bottleneck`, AdapterHub's ``DoubleSeqBnConfig``.

    The start is near the base model: weights of deviation 1e-3, zero biases. AdapterHub starts with 0.02 ("bert") and
    its activation is swish; with ``init_weights="mam_adapter"`` the start is the base model exactly.

    >>> import jax, jax.numpy as jnp
    >>> method = houlsby(bottleneck_size=2, mh_adapter=False)
    >>> params = method.init(jax.random.key(0), {"mlp": {"down_proj": {"kernel": jnp.ones((8, 6))}}})
    >>> params["mlp"]["adapter_down"].shape, params["mlp"]["adapter_up"].shape
    ((6, 2), (2, 6))
    """
    return bottleneck(
        reduction_factor=reduction_factor, non_linearity=non_linearity, bottleneck_size=bottleneck_size,
        mh_adapter=mh_adapter, output_adapter=output_adapter, scaling=scaling, ln_before=ln_before, ln_after=ln_after,
        init_weights=init_weights, dropout=dropout, leave_out=leave_out, attention_modules=attention_modules,
        output_modules=output_modules, hidden_size=hidden_size, modules_to_save=modules_to_save)


# In tables and benchmarks.
SHOWN = {"arguments": {"reduction_factor": 16}, "note": "", "checked": "`adapters` 1.3, golden values"}
